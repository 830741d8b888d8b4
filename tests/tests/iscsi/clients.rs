//! QEMU's iSCSI driver as an initiator that others have written.

use super::*;

/// qemu-img, with its iSCSI driver: a module that Debian has in a package of its own. `scripts/setup test` unpacks it where that package is
/// not installed, and `scripts/test` says where.
fn qemu_img() -> Command {
    let mut command = system("qemu-img");
    if let Some(folder) = std::env::var_os("VMFS_QEMU_MODULES") {
        command.env("QEMU_MODULE_DIR", folder);
    }
    command
}

/// An image of 32 MiB with an ext4 in it that has a file of `data`.
fn ext4(folder: &Path, data: &[u8]) -> PathBuf {
    let (image, root) = (folder.join("ext4.img"), folder.join("root"));
    fs::create_dir(&root).unwrap();
    fs::write(root.join("file"), data).unwrap();
    fs::File::create(&image).unwrap().set_len(32 << 20).unwrap();
    run(system("mkfs.ext4").arg("-q").arg("-d").arg(&root).arg(&image));
    image
}

#[test]
fn qemu_converts_compares_and_measures_on_a_lun() {
    let target = Target::start(",thin");
    let folder = target.folder.path();
    let data = Random::new(3).bytes(3 << 20);
    let image = ext4(folder, &data);
    let url = target.url(0);
    // As it is: the bytes of the LUN are those of the image.
    run(qemu_img().args(["convert", "-n", "-f", "raw", "-O", "raw"]).arg(&image).arg(&url));
    run(qemu_img().args(["compare", "-f", "raw", "-F", "raw"]).arg(&image).arg(&url));
    let lun = fs::read(folder.join("disk.img")).unwrap();
    let bytes = fs::read(&image).unwrap();
    assert!(lun[..bytes.len()] == bytes && lun[bytes.len()..].iter().all(|byte| *byte == 0));
    let info = run(qemu_img().args(["info", "-f", "raw"]).arg(&url));
    assert!(info.contains("100 MiB"), "{info}");

    // Load, which leaves the blocks that it writes different.
    run(qemu_img().args(["bench", "-f", "raw", "-t", "none", "-c", "2000", "-d", "32", "-s", "4096"]).arg(&url));
    run(qemu_img()
        .args(["bench", "-w", "-f", "raw", "-t", "none", "-c", "500", "-d", "16", "-s", "65536", "--pattern=90"])
        .arg(&url));
    assert!(fs::read(folder.join("disk.img")).unwrap()[..500 << 16].iter().all(|byte| *byte == 90));

    // An image with a format of its own, made on the LUN through one portal and read through the other one.
    run(qemu_img().args(["create", "-q", "-f", "qcow2"]).arg(&url).arg("32M"));
    run(qemu_img().args(["convert", "-n", "-f", "raw", "-O", "qcow2"]).arg(&image).arg(&url));
    run(qemu_img().args(["check", "-f", "qcow2"]).arg(target.url(1)));
    run(qemu_img().args(["compare", "-f", "raw", "-F", "qcow2"]).arg(&image).arg(target.url(1)));
    let back = folder.join("back.img");
    run(qemu_img().args(["convert", "-f", "qcow2", "-O", "raw"]).arg(target.url(1)).arg(&back));
    run(system("e2fsck").args(["-f", "-n"]).arg(&back));
    let read = output(system("debugfs").args(["-R", "cat /file"]).arg(&back));
    assert!(read.stdout == data, "the file of the ext4");
    target.stop();
}
