//! Owns: what the script inside User-Mode Linux asks of the machine around it: files in a directory that both see.
//! Promises: each request is carried out once, and answered.
//! Must not know: drivers.
//!
//! A request is a file `ask` of one line: `stall SECONDS`, `plug TARGET DISK` or `unplug TARGET`; the answer is a file `answer` with
//! `done` or why not. The one that asks puts its file there by renaming it and removes the answer. A stall ends by itself: the driver's
//! aborts wait for the disk, and User-Mode Linux, with its one processor, waits for its driver.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::adapter::Pluggable;

/// Looks for requests as long as the program runs.
pub fn watch(directory: PathBuf, adapter: Arc<Pluggable>) -> io::Result<()> {
    const LOOK: Duration = Duration::from_millis(20);
    let look = move || {
        loop {
            std::thread::sleep(LOOK);
            let ask = directory.join("ask");
            let Ok(request) = fs::read_to_string(&ask) else { continue };
            let answer = carry_out(request.trim(), &adapter).map_or_else(|why| why, |()| "done".to_owned());
            let (new, place) = (directory.join("answer.new"), directory.join("answer"));
            let answered =
                fs::remove_file(&ask).and_then(|()| fs::write(&new, answer)).and_then(|()| fs::rename(new, place));
            if let Err(error) = answered {
                tracing::error!(%error, request, "a request cannot be answered");
            }
        }
    };
    std::thread::Builder::new().name("requests".to_owned()).spawn(look).map(drop)
}

fn carry_out(request: &str, adapter: &Arc<Pluggable>) -> Result<(), String> {
    let target = |text: &str| text.parse::<u8>().map_err(|cause| format!("target {text}: {cause}"));
    match *request.split(' ').collect::<Vec<_>>() {
        ["stall", seconds] => {
            let seconds = seconds.parse().map_err(|cause| format!("{seconds} seconds: {cause}"))?;
            let adapter = Arc::clone(adapter);
            adapter.stall(true);
            let resume = move || {
                std::thread::sleep(Duration::from_secs(seconds));
                adapter.stall(false);
            };
            std::thread::Builder::new().name("stall".to_owned()).spawn(resume).map_err(|cause| cause.to_string())?;
        }
        ["plug", number, disk] => adapter.plug(target(number)?, disk.parse()?).map_err(|cause| cause.to_string())?,
        ["unplug", number] => adapter.unplug(target(number)?).map_err(|cause| cause.to_string())?,
        _ => return Err(format!("{request}: no such request")),
    }
    Ok(())
}
