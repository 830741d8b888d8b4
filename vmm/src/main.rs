//! Owns the command `vmm`: flags in, a machine run, its end reported.
//! Promises exit status 0, 1 or 2 as `--help` says, and a clean stop on SIGTERM and SIGINT.
//! Must not know how a machine works.
#![forbid(unsafe_code)]

use clap::Parser;
use parking_lot::Mutex;
use serde::Serialize;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;
use vmm::board::ExitTotals;
use vmm::config::{Command, CommandLine, RunArguments};
use vmm::control::{Control, Outcome};
use vmm::error::{Error, Kind, Result};
use vmm::machine::Machine;

const REFUSED: u8 = 1;
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_env("VMM_LOG").unwrap_or_else(|_| "warn".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    // Where nobody reads standard error any more, the machine goes on.
    log.with_ansi(std::io::stderr().is_terminal()).log_internal_errors(false).init();
    let Command::Run(arguments) = CommandLine::parse().command;
    match run(&arguments) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            say(&error.to_string());
            ExitCode::from(if error.kind() == Kind::Usage { USAGE } else { REFUSED })
        }
    }
}

/// Tells the user on standard error, if anybody reads it.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "vmm: {text}");
}

/// How a run ended, for `--json`.
#[derive(Serialize)]
struct Report {
    outcome: &'static str,
    guest_status: Option<u8>,
    cause: Option<String>,
    resets: u32,
    seconds: f64,
    exits: ExitTotals,
}

/// What a signal stops: the machine that runs now, and those that would follow it.
#[derive(Default)]
struct Stopper {
    stopped: bool,
    running: Option<Arc<Control>>,
}

impl Stopper {
    fn stop(&mut self) {
        self.stopped = true;
        if let Some(control) = &self.running {
            control.finish(Outcome::Stopped);
        }
    }

    fn watch(&mut self, control: Arc<Control>) {
        if self.stopped {
            control.finish(Outcome::Stopped);
        }
        self.running = Some(control);
    }
}

/// Runs the machine under the care of SIGTERM and SIGINT and returns the exit status.
fn run(arguments: &RunArguments) -> Result<u8> {
    let mut signals = Signals::new([SIGTERM, SIGINT])
        .map_err(|cause| Error::new(Kind::Host, "signal handlers", cause, "Check the limits of the process"))?;
    let handle = signals.handle();
    let stopper = Mutex::new(Stopper::default());
    std::thread::scope(|scope| {
        scope.spawn(|| signals.forever().for_each(|_| stopper.lock().stop()));
        // A panic too ends the thread that waits for signals, which the scope waits for.
        let _ended = Closing(handle);
        run_until_end(arguments, &stopper)
    })
}

/// Ends the thread that waits for signals when it is dropped.
struct Closing(Handle);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Runs the machine, again after each reset if so asked.
fn run_until_end(arguments: &RunArguments, stopper: &Mutex<Stopper>) -> Result<u8> {
    let started = Instant::now();
    let mut machine = Machine::new(&arguments.machine())?;
    let mut resets = 0;
    let outcome = loop {
        stopper.lock().watch(machine.control());
        machine.start()?;
        let outcome = machine.wait();
        if outcome != Outcome::Reset || arguments.exit_on_reset {
            break outcome;
        }
        resets += 1;
        machine.reset()?;
    };
    let stopped = machine.stop();
    let seconds = started.elapsed().as_secs_f64();
    let status = report(arguments.json, &outcome, resets, seconds, machine.exits());
    stopped.map(|()| status)
}

/// Says how the machine ended and returns the exit status.
fn report(json: bool, outcome: &Outcome, resets: u32, seconds: f64, exits: ExitTotals) -> u8 {
    let (name, guest_status, cause, status) = match outcome {
        Outcome::Exited(0) => ("exited", Some(0), None, 0),
        Outcome::Exited(status) => ("exited", Some(*status), None, REFUSED),
        Outcome::Reset => ("reset", None, None, 0),
        Outcome::Stopped => ("stopped", None, None, 0),
        Outcome::Failed(cause) => ("failed", None, Some(cause.clone()), REFUSED),
        _ => ("ended", None, None, REFUSED),
    };
    match (&cause, guest_status) {
        (Some(cause), _) => say(&format!("the machine failed: {cause}")),
        (None, Some(status)) if status != 0 => say(&format!("the guest ended with status {status}")),
        _ => {}
    }
    if json {
        let report = Report { outcome: name, guest_status, cause, resets, seconds, exits };
        let written = serde_json::to_string(&report)
            .map_err(std::io::Error::from)
            .and_then(|text| writeln!(std::io::stdout(), "{text}"));
        if let Err(cause) = written {
            say(&format!("standard output: {cause}. The report is lost"));
        }
    }
    status
}
