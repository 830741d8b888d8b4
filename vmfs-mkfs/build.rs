//! Cargo builds no program with a dot in its name. This puts the names that mkfs(8), fsck(8) and people type, `mkfs.vmfs` and
//! `fsck.vmfs`, beside the programs as symbolic links.

use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    // OUT_DIR is PROFILE/build/PACKAGE-HASH/out.
    let folder = out.ancestors().nth(3).expect("OUT_DIR lies three folders below the programs");
    for (name, program) in [("mkfs.vmfs", "mkfs-vmfs"), ("fsck.vmfs", "fsck-vmfs")] {
        if let Err(error) = link(&folder.join(name), program) {
            println!("cargo::warning={}/{name}: {error}", folder.display());
        }
    }
}

fn link(link: &Path, program: &str) -> io::Result<()> {
    if std::fs::read_link(link).is_ok_and(|target| target == Path::new(program)) {
        return Ok(());
    }
    match std::fs::remove_file(link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => symlink(program, link),
    }
}
