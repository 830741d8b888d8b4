//! The direction "who may know whom" of docs/ARCHITECTURE.md, read off the manifests and the sources.

use std::fs;
use std::path::{Path, PathBuf};

const CRATES: &[&str] = &[
    "vmfs-core",
    "vmfs-fuse",
    "vmfs-mkfs",
    "lockd",
    "luns",
    "scsi",
    "storage",
    "vmm",
    "iscsi",
    "iscsi-target",
    "nfs-backend",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace is above").to_owned()
}

/// Names of a crate's `[dependencies]`.
fn dependencies(name: &str) -> Vec<String> {
    let manifest = fs::read_to_string(root().join(name).join("Cargo.toml")).expect("each crate has a manifest");
    let section = manifest.split("\n[dependencies]").nth(1).unwrap_or("").split("\n[").next().unwrap_or("");
    let names = section.lines().filter_map(|line| line.split(['.', '=', ' ']).next());
    names.filter(|name| !name.is_empty() && !name.starts_with('#')).map(str::to_owned).collect()
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("a source folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
    found
}

fn assert_never_says(folder: &str, words: &[&str]) {
    for file in sources(&root().join(folder)) {
        let text = fs::read_to_string(&file).expect("a source file");
        for line in text.lines().filter(|l| !l.trim_start().starts_with("//")) {
            for word in words {
                assert!(!line.contains(word), "{} must not know {word}: {line}", file.display());
            }
        }
    }
}

#[test]
fn the_core_knows_no_other_crate_of_the_project() {
    for name in ["vmfs-core", "scsi"] {
        for other in CRATES {
            assert!(!dependencies(name).iter().any(|d| d == other), "{name} depends on {other}");
        }
    }
}

#[test]
fn the_core_knows_no_fuse_no_kvm_and_no_command_line() {
    for foreign in ["fuser", "kvm-ioctls", "vm-memory", "clap", "indicatif", "tokio-uring"] {
        assert!(!dependencies("vmfs-core").iter().any(|d| d == foreign), "vmfs-core depends on {foreign}");
    }
}

#[test]
fn the_format_does_no_io() {
    assert_never_says(
        "vmfs-core/src/format",
        &["std::fs", "std::io", "std::time", "crate::lun", "crate::env", "async fn"],
    );
}

#[test]
fn the_vmm_and_the_target_write_no_metadata() {
    for name in ["vmm", "iscsi-target"] {
        assert!(!dependencies(name).iter().any(|d| d == "vmfs-fuse" || d == "vmfs-mkfs"), "{name} knows the mount");
    }
    assert_never_says("storage/src", &["vmfs_core::format", "vmfs_core::cas", "vmfs_core::alloc", "vmfs_core::object"]);
    assert_never_says("vmm/src", &["vmfs_core::format", "vmfs_core::cas", "vmfs_core::alloc", "vmfs_core::object"]);
    assert_never_says("iscsi-target/src", &["vmfs_core::format", "vmfs_core::alloc", "vmfs_core::object"]);
}

#[test]
fn the_core_knows_no_socket_and_no_scsi_command() {
    assert_never_says("vmfs-core/src", &["std::net", "TcpStream", "scsi::", "iscsi::"]);
    for above in ["lockd", "vmfs-fuse", "vmfs-mkfs"] {
        assert!(!dependencies("luns").iter().any(|d| d == above), "luns depends on {above}");
    }
}

#[test]
fn every_program_opens_its_luns_in_one_place() {
    for name in ["vmfs-fuse", "lockd"] {
        assert_never_says(&format!("{name}/src"), &["lun::open_lun", "OpenLun, open_lun"]);
    }
}

#[test]
fn the_device_server_knows_no_transport() {
    for foreign in ["vm-memory", "tokio-uring", "kvm-ioctls", "vmfs-core", "lockd"] {
        assert!(!dependencies("scsi").iter().any(|d| d == foreign), "scsi depends on {foreign}");
    }
}

#[test]
fn the_protocol_of_iscsi_knows_neither_its_daemon_nor_what_it_carries() {
    for other in CRATES.iter().filter(|name| **name != "scsi") {
        assert!(!dependencies("iscsi").iter().any(|d| d == other), "iscsi depends on {other}");
    }
}

#[test]
fn the_nfs_client_knows_of_the_project_only_the_memory_of_a_command() {
    for other in CRATES.iter().filter(|name| **name != "scsi") {
        assert!(!dependencies("nfs-backend").iter().any(|d| d == other), "nfs-backend depends on {other}");
    }
    for file in sources(&root().join("nfs-backend/src")) {
        let text = fs::read_to_string(&file).expect("a source file");
        for line in text.lines().filter(|line| line.contains("scsi::")) {
            assert!(line.contains("scsi::DataBuffer"), "{} may know no more of scsi: {line}", file.display());
        }
    }
}
