//! The daemon is killed in the middle of a load, and started again.

use std::collections::HashMap;
use std::sync::Mutex;
use std::thread;

use super::*;

/// Initiator ports that write, each in its own part of the LUN.
const WRITERS: u8 = 4;
const BLOCK: usize = 4096;
/// Blocks of a writer's part.
const BLOCKS: u64 = 256;
const CRASHES: usize = 3;
/// Writes of each writer before the crash may come.
const AT_LEAST: usize = 40;

/// What a block may hold: the last write that was acknowledged, and one on the way when the daemon died.
#[derive(Clone, Copy, Default)]
struct Known {
    acknowledged: u64,
    on_its_way: Option<u64>,
}

type Model = HashMap<u64, Known>;

fn content(block: u64, stamp: u64) -> Vec<u8> {
    if stamp == 0 {
        return vec![0; BLOCK];
    }
    (0..BLOCK as u64 / 8).flat_map(|word| (stamp ^ block << 32 ^ word << 48).to_le_bytes()).collect()
}

fn transfer(opcode: u8, fua: bool, block: u64) -> [u8; 10] {
    let mut cdb = [opcode, u8::from(fua) << 3, 0, 0, 0, 0, 0, 0, (BLOCK / 512) as u8, 0];
    cdb[2..6].copy_from_slice(&((block * BLOCK as u64 / 512) as u32).to_be_bytes());
    cdb
}

fn reserve_out(action: u8, kind: u8, own: u64, new: u64) -> ([u8; 10], [u8; 24]) {
    let mut parameters = [0; 24];
    parameters[..8].copy_from_slice(&own.to_be_bytes());
    parameters[8..16].copy_from_slice(&new.to_be_bytes());
    // APTPL.
    parameters[20] = 1;
    ([0x5F, action, kind, 0, 0, 0, 0, 0, 24, 0], parameters)
}

/// Writes until the connection breaks.
fn write_on(mut session: RawInitiator, writer: u8, round: u64, model: &mut Model, done: &Mutex<usize>) {
    let mut random = Random::new(round * 100 + u64::from(writer));
    for nth in 1.. {
        let block = u64::from(writer) * BLOCKS + random.below(BLOCKS);
        let stamp = round << 24 | nth;
        let known = model.entry(block).or_default();
        known.on_its_way = Some(stamp);
        let kind = random.below(8);
        let written =
            session.try_command(&transfer(0x2A, kind == 0, block), 0x20, &content(block, stamp), BLOCK as u32);
        let Ok((status, _)) = written else { return };
        assert_eq!(status, 0, "a write of a registered port");
        *known = Known { acknowledged: stamp, on_its_way: None };
        *done.lock().unwrap() += 1;
        // SYNCHRONIZE CACHE now and then.
        if kind == 1 && session.try_command(&[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0], 0, &[], 0).is_err() {
            return;
        }
    }
}

fn crash_under_load(options: &str) {
    let mut target = Target::start(options);
    let mut models: Vec<Model> = (0..WRITERS).map(|_| Model::new()).collect();
    for round in 1..=CRASHES as u64 {
        let portal = |writer: u8| target.portals[usize::from(writer) % 2].clone();
        let sessions: Vec<_> =
            (0..WRITERS).map(|writer| RawInitiator::log_in_port(&portal(writer), NAME, "", writer + 1)).collect();
        let mut sessions = sessions;
        if round == 1 {
            // All registrants hold it: write exclusive, all registrants (SPC-4, 5.13.10).
            for (writer, session) in sessions.iter_mut().enumerate() {
                let (cdb, parameters) = reserve_out(0, 0, 0, 0x100 + writer as u64);
                session.check_write(&cdb, &parameters);
            }
            let (cdb, parameters) = reserve_out(1, 7, 0x100, 0);
            sessions[0].check_write(&cdb, &parameters);
        }
        let done = Mutex::new(0);
        thread::scope(|scope| {
            for (writer, (session, model)) in sessions.into_iter().zip(&mut models).enumerate() {
                let done = &done;
                scope.spawn(move || write_on(session, writer as u8, round, model, done));
            }
            wait_for("a load", || *done.lock().unwrap() >= AT_LEAST * usize::from(WRITERS));
            target.daemon.kill().unwrap();
        });
        target.crash();

        let mut session = RawInitiator::log_in_port(&target.portals[0], NAME, "", 1);
        let keys = session.check_read(&[0x5E, 0, 0, 0, 0, 0, 0, 0, 255, 0], 255);
        let mut keys: Vec<u64> =
            keys[8..].chunks_exact(8).map(|key| u64::from_be_bytes(key.try_into().unwrap())).collect();
        keys.sort_unstable();
        assert_eq!(keys, (0..u64::from(WRITERS)).map(|writer| 0x100 + writer).collect::<Vec<_>>());
        let reservation = session.check_read(&[0x5E, 1, 0, 0, 0, 0, 0, 0, 255, 0], 255);
        assert_eq!(reservation[21] & 0x0F, 7, "{reservation:?}");
        // A port without a registration writes nothing: RESERVATION CONFLICT.
        let mut stranger = RawInitiator::log_in_port(&target.portals[0], NAME, "", 99);
        assert_eq!(stranger.command(&transfer(0x2A, false, 0), 0x20, &[0xEE; BLOCK], BLOCK as u32).0, 0x18);
        for (&block, known) in models.iter_mut().flatten() {
            let found = session.check_read(&transfer(0x28, false, block), BLOCK as u32);
            let stamps = [Some(known.acknowledged), known.on_its_way];
            let stamp = stamps.into_iter().flatten().find(|stamp| content(block, *stamp) == found);
            let Some(stamp) = stamp else {
                panic!("round {round}: block {block} has lost write {}", known.acknowledged)
            };
            *known = Known { acknowledged: stamp, on_its_way: None };
        }
    }
    target.stop();
}

#[test]
fn no_acknowledged_write_and_no_reservation_is_lost_when_the_daemon_is_killed_under_load() {
    crash_under_load(",thin");
}

#[test]
fn nothing_is_lost_past_the_page_cache_either() {
    crash_under_load(",thin,direct");
}

/// The kernel closes what a killed daemon's ring had in flight only when that has ended, and the file stays locked until then.
#[test]
fn a_file_that_its_former_daemon_still_holds_is_waited_for() {
    let mut target = Target::start("");
    let held = fs::File::open(target.folder.path().join("disk.img")).unwrap();
    signal(target.daemon.id(), libc::SIGKILL);
    // By now the daemon has let go, so this one holds it next.
    target.daemon.wait().unwrap();
    wait_for("the file to be free", || held.try_lock().is_ok());
    let holder = thread::spawn(move || {
        thread::sleep(std::time::Duration::from_secs(1));
        drop(held);
    });
    target.crash();
    holder.join().unwrap();
    assert_eq!(target.status()["targets"][0]["name"], NAME);
}
