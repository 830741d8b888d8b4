//! What an administrator does with a running target: new configurations, status, CD-ROMs.

use super::*;

const SECOND: &str = "iqn.2026-01.test:second";

/// A target whose configuration is a file.
struct Configured {
    target: Target,
}

impl Configured {
    fn start(configuration: &str) -> Configured {
        let folder = folder();
        for name in ["disk.img", "second.img", "third.img"] {
            fs::File::create(folder.path().join(name)).unwrap().set_len(16 << 20).unwrap();
        }
        let file = folder.path().join("config.toml");
        fs::write(&file, Self::text(&folder, configuration)).unwrap();
        let (daemon, portals) = launch(folder.path(), &["--config".to_owned(), file.to_str().unwrap().to_owned()]);
        Configured { target: Target { folder, options: String::new(), daemon, portals } }
    }

    fn text(folder: &TempDir, configuration: &str) -> String {
        format!("portal = ['127.0.0.1:0']\n{configuration}").replace("IN/", &format!("{}/", folder.path().display()))
    }

    fn configure(&self, configuration: &str) {
        let text = Self::text(&self.target.folder, configuration);
        fs::write(self.target.folder.path().join("config.toml"), text).unwrap();
    }

    fn reload(&self) -> Command {
        let mut command = Command::new(program("iscsi-target"));
        command.args(["reload", "--control"]).arg(self.target.control());
        command
    }

    /// A configuration that is refused, by a message with `word`; everything stays as it was.
    #[track_caller]
    fn is_refused(&self, configuration: &str, word: &str) {
        let before = self.target.status()["targets"].clone();
        self.configure(configuration);
        let told = refused(&mut self.reload(), 1);
        assert!(told.contains(word), "{told}");
        let after = self.target.status()["targets"].clone();
        for (one, other) in before.as_array().unwrap().iter().zip(after.as_array().unwrap()) {
            assert_eq!((&one["name"], &one["luns"]), (&other["name"], &other["luns"]));
        }
        assert_eq!(before.as_array().unwrap().len(), after.as_array().unwrap().len());
    }
}

fn one_lun(name: &str, path: &str) -> String {
    format!("[[target]]\nname = '{name}'\nlun = [{{ path = '{path}' }}]\n")
}

#[test]
fn a_new_configuration_takes_the_place_of_the_old_one_and_no_session_ends() {
    let served = Configured::start(&one_lun(NAME, "IN/disk.img"));
    let portal = served.target.portals[0].clone();
    let mut session = RawInitiator::log_in(&portal, NAME, "");
    let two =
        format!("[[target]]\nname = '{NAME}'\nlun = [{{ path = 'IN/disk.img' }}, {{ path = 'IN/second.img' }}]\n");
    served.configure(&format!("{two}{}", one_lun(SECOND, "IN/third.img")));
    let told = run(&mut served.reload());
    assert!(told.contains("LUN 1") && told.contains(SECOND), "{told}");
    // TEST UNIT READY: REPORTED LUNS DATA HAS CHANGED (SPC-4, 5.8.7).
    assert_eq!(session.command(&[0; 6], 0, &[], 0).0, 2);
    assert_eq!((session.sense[2] & 0x0F, session.sense[12], session.sense[13]), (6, 0x3F, 0x0E));
    // REPORT LUNS: two of them.
    let luns = session.check_read(&[0xA0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0], 64);
    assert_eq!(luns[3], 16, "{luns:?}");
    session.lun = 1;
    // It has come, and the list of LUNs has changed: both are told.
    session.command(&[0; 6], 0, &[], 0);
    session.command(&[0; 6], 0, &[], 0);
    session.check_write(&[0x2A, 0, 0, 0, 0, 0, 0, 0, 1, 0], &[0x77; 512]);
    RawInitiator::log_in(&portal, SECOND, "").check_read(&[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0], 512);
    wait_for("the second target's session to end", || {
        served.target.status()["targets"][1]["sessions"].as_array().unwrap().is_empty()
    });

    // What is used stays, and so does everything when something is wrong.
    served.is_refused(&one_lun(NAME, "IN/disk.img"), "iqn.2026-01.test:raw");
    served.is_refused(&one_lun(SECOND, "IN/third.img"), NAME);
    served.is_refused("[[target]]\nname = ", "config.toml");
    let nothing =
        format!("{two}{}{}", one_lun(SECOND, "IN/third.img"), one_lun("iqn.2026-01.test:x", "IN/nothing.img"));
    served.is_refused(&nothing, "nothing.img");
    served.is_refused(&format!("{two}{}", one_lun(SECOND, "IN/second.img")), "cannot change while it is served");
    served.is_refused(&format!("portal = ['127.0.0.1:1']\n{two}"), "config.toml");
    session.check_read(&[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0], 512);

    // Once nobody uses it, it goes; from now on a proof is needed.
    drop(session);
    wait_for("the session to end", || served.target.status()["targets"][0]["sessions"].as_array().unwrap().is_empty());
    let guarded = one_lun(NAME, "IN/disk.img") + "[target.chap]\nuser = 'host'\nsecret = 'at-least-12-characters'\n";
    served.configure(&guarded);
    signal(served.target.daemon.id(), libc::SIGHUP);
    wait_for("the new configuration", || {
        let told = served.target.status();
        told["targets"].as_array().unwrap().len() == 1 && told["targets"][0]["luns"].as_array().unwrap().len() == 1
    });
    let answer = open(&portal, NAME, "").unwrap().1;
    assert_ne!((answer[1] & 0x80, answer[36]), (0x80, 0), "a login without a proof");
    let url = format!("iscsi://host%at-least-12-characters@{portal}/{NAME}/0");
    run(system("iscsi-readcapacity16").arg(url));
    // The file of the LUN that is gone is free again.
    served.configure(&format!("{guarded}{}", one_lun(SECOND, "IN/second.img")));
    run(&mut served.reload());
    let mut session = RawInitiator::log_in(&portal, SECOND, "");
    assert_eq!(session.check_read(&[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0], 512), [0x77; 512]);
    drop(session);
    served.target.stop();
}

#[test]
fn without_a_configuration_file_there_is_nothing_to_reload() {
    let target = Target::start("");
    let mut reload = Command::new(program("iscsi-target"));
    let told = refused(reload.args(["reload", "--control"]).arg(target.control()), 1);
    assert!(told.contains("--config"), "{told}");
    target.stop();
}

#[test]
fn status_tells_keys_registrants_and_what_sessions_do() {
    let target = Target::start("");
    let mut session = RawInitiator::log_in(&target.portals[1], NAME, "");
    let mut parameters = [0u8; 24];
    parameters[8..16].copy_from_slice(&0xABCD_u64.to_be_bytes());
    session.check_write(&[0x5F, 0, 0, 0, 0, 0, 0, 0, 24, 0], &parameters);
    parameters[..8].copy_from_slice(&0xABCD_u64.to_be_bytes());
    // RESERVE, write exclusive.
    session.check_write(&[0x5F, 1, 1, 0, 0, 0, 0, 0, 24, 0], &parameters);
    session.check_read(&[0x28, 0, 0, 0, 0, 0, 0, 0, 8, 0], 4096);
    let told = target.status();
    let lun = &told["targets"][0]["luns"][0];
    assert_eq!((&lun["reservation"], &lun["reservation_generation"]), (&Value::from(1), &Value::from(1)));
    let registrant = &lun["registrants"][0];
    assert_eq!((&registrant["key"], &registrant["holds"]), (&Value::from("0x000000000000abcd"), &Value::from(true)));
    assert_eq!(registrant["portal"], 2);
    assert!(registrant["initiator"].as_str().unwrap().starts_with("iqn.2026-01.test:raw,"), "{registrant}");
    let told = &told["targets"][0]["sessions"][0];
    assert_eq!((&told["bytes_read"], &told["queue_depth"]), (&Value::from(4096), &Value::from(0)));
    wait_for("a rate", || {
        session.check_read(&[0x28, 0, 0, 0, 0, 0, 0, 0, 8, 0], 4096);
        let told = &target.status()["targets"][0]["sessions"][0];
        told["iops"].as_u64().unwrap() > 0 && told["read_bytes_per_second"].as_u64().unwrap() >= 4096
    });
    let printed = run(Command::new(program("iscsi-target")).args(["status", "--control"]).arg(target.control()));
    for word in ["key 0x000000000000abcd", "holds the reservation", "reserved, type 1", "in the last second"] {
        assert!(printed.contains(word), "{printed}");
    }
    target.stop();
}

#[test]
fn an_iso_file_is_a_cd_rom() {
    let folder = folder();
    let image = folder.path().join("image.iso");
    let data: Vec<u8> = (0..100 * 2048u32).map(|n| (n / 2048 + n) as u8).collect();
    fs::write(&image, &data).unwrap();
    let lun = format!("{NAME}={},cdrom", image.display());
    let (daemon, portals) = launch(folder.path(), &["--portal", "127.0.0.1:0", "--target", &lun].map(str::to_owned));
    let target = Target { folder, options: String::new(), daemon, portals };
    let told = run(system("iscsi-inq").arg(target.url(0)));
    assert!(told.contains("MMC") && told.contains("Removable:1"), "{told}");
    let mut drive = RawInitiator::log_in(&target.portals[0], NAME, "");
    // READ CAPACITY(10).
    assert_eq!(drive.check_read(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8), [0, 0, 0, 99, 0, 0, 8, 0]);
    assert!(drive.check_read(&[0x28, 0, 0, 0, 0, 7, 0, 0, 3, 0], 6144) == data[7 * 2048..10 * 2048]);
    // READ TOC (MMC-6, 6.25): one track, and the lead-out at the end.
    let contents = drive.check_read(&[0x43, 0, 0, 0, 0, 0, 0, 0, 64, 0], 64);
    assert_eq!(contents, [0, 18, 1, 1, 0, 0x14, 1, 0, 0, 0, 0, 0, 0, 0x14, 0xAA, 0, 0, 0, 0, 100]);
    // GET CONFIGURATION (6.6): the profile is CD-ROM.
    assert_eq!(drive.check_read(&[0x46, 0, 0, 0, 0, 0, 0, 0, 8, 0], 8)[6..], [0, 8]);
    assert_ne!(drive.command(&[0x2A, 0, 0, 0, 0, 0, 0, 0, 1, 0], 0x20, &[0; 2048], 2048).0, 0, "a write");
    // Where removal is forbidden, nothing is ejected (6.13).
    drive.command(&[0x1E, 0, 0, 0, 1, 0], 0, &[], 0);
    assert_eq!(drive.command(&[0x1B, 0, 0, 0, 2, 0], 0, &[], 0).0, 2);
    drive.command(&[0x1E, 0, 0, 0, 0, 0], 0, &[], 0);
    assert_eq!(drive.command(&[0x1B, 0, 0, 0, 2, 0], 0, &[], 0).0, 0);
    assert_eq!(drive.command(&[0; 6], 0, &[], 0).0, 2);
    assert_eq!((drive.sense[2] & 0x0F, drive.sense[12]), (2, 0x3A), "medium not present");
    // GET EVENT STATUS NOTIFICATION (6.7), media: the tray is open.
    let event = drive.check_read(&[0x4A, 1, 0, 0, 0x10, 0, 0, 0, 8, 0], 8);
    assert_eq!((event[2] & 0x07, event[5] & 0x03), (4, 0x01), "{event:?}");
    assert_eq!(drive.command(&[0x1B, 0, 0, 0, 3, 0], 0, &[], 0).0, 0);
    drop(drive);
    target.stop();
}
