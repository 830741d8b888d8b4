//! Wrong input ends in an error that names object, cause and next step.

mod common;

use std::fs;
use std::path::Path;

use common::{Images, is_mounted, mount_command, text};

fn refused(spec: &str, point: &Path, status: i32) -> String {
    let output = mount_command().arg(spec).arg(point).output().unwrap();
    assert_eq!(output.status.code(), Some(status), "{}", text(&output));
    assert!(!is_mounted(point));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("mount.vmfs: ") && !said.contains("panicked"), "{said}");
    said
}

#[test]
fn wrong_mount_points_are_refused() {
    let images = Images::new(1, 128);
    let spec = images.spec();
    assert!(refused(&spec, &images.folder.path().join("nowhere"), 1).contains("nowhere"));
    let full = images.directory("full");
    fs::write(full.join("file"), "").unwrap();
    assert!(refused(&spec, &full, 1).contains("not empty"));
    assert!(refused(&spec, &full.join("file"), 1).contains("not a directory"));
}

#[test]
fn wrong_luns_are_refused_by_name() {
    let (images, other) = (Images::new(2, 128), Images::new(1, 128));
    let point = images.directory("point");
    let [first, second] = [0, 1].map(|n| images.paths[n].to_str().unwrap());
    let foreign = other.paths[0].to_str().unwrap();
    assert!(refused(&format!("{first},{foreign}"), &point, 1).contains(foreign));
    assert!(refused(&format!("{first},{second},{first}"), &point, 1).contains("twice"));
    let missing = refused(first, &point, 1);
    assert!(missing.contains("missing") || missing.contains("lun2"), "{missing}");
    assert!(refused("/nonexistent/lun", &point, 1).contains("/nonexistent/lun"));
    let blank = images.folder.path().join("blank");
    fs::File::create(&blank).unwrap().set_len(64 << 20).unwrap();
    assert!(refused(blank.to_str().unwrap(), &point, 1).contains("blank"));
    fs::File::options().write(true).open(second).unwrap().set_len(64 << 20).unwrap();
    assert!(refused(&format!("{first},{second}"), &point, 1).contains("lun1.img"));
}

#[test]
fn wrong_words_end_with_status_2_and_help_with_0() {
    for words in [&["--no-such-flag"][..], &["a"], &["a", "/m", "-o", "bogus"]] {
        assert_eq!(mount_command().args(words).output().unwrap().status.code(), Some(2), "{words:?}");
    }
    for words in ["--help", "--version"] {
        let output = mount_command().arg(words).output().unwrap();
        assert!(output.status.success() && !output.stdout.is_empty());
    }
}
