//! Owns: how fsck.vmfs repairs: who consents, what is printed, the undo file.
//! Promises: without -y nothing that can lose something is done unasked; every change is said.
//! Must not know: what is wrong with a volume.

use std::io::{BufRead, IsTerminal, Write};
use std::path::Path;
use std::rc::Rc;

use serde_json::{Value, json};
use vmfs_core::check::{Finding, Observer, Progress};
use vmfs_core::env::Env;
use vmfs_core::error::{FsError, FsErrorKind};
use vmfs_core::lun::Lun;
use vmfs_core::repair::{RepairOptions, Repaired, Repairer, UndoLog, identities, repair, undo};

use super::undo::{UndoReader, UndoWriter};
use super::{Arguments, Printer};
use crate::terminal::{say, watching};

/// Who decides what can lose something.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Consent {
    Never,
    Always,
    Asked,
    /// The user has had enough.
    Ended,
}

struct Teller<'a> {
    printer: &'a mut Printer,
    consent: Consent,
    json: bool,
    repairs: Vec<String>,
    refused: Vec<String>,
    /// What the check before the repair found.
    found: Vec<Finding>,
}

impl Observer for Teller<'_> {
    fn finding(&mut self, finding: Finding) {
        self.printer.finding(finding);
    }

    fn progress(&mut self, progress: Progress) {
        self.printer.progress(progress);
    }
}

impl Repairer for Teller<'_> {
    fn repaired(&mut self, what: &str) {
        if self.json {
            self.repairs.push(what.to_owned());
        } else {
            self.printer.end();
            say(format!("repaired: {what}"));
        }
    }

    fn checks_again(&mut self) {
        self.printer.end();
        self.found = std::mem::take(&mut self.printer.kept);
        if !self.json {
            say("checking again");
        }
    }

    fn consents(&mut self, question: &str) -> bool {
        self.printer.end();
        let yes = match self.consent {
            Consent::Always => true,
            Consent::Never | Consent::Ended => false,
            Consent::Asked => match ask(question) {
                Some(yes) => yes,
                None => {
                    self.consent = Consent::Ended;
                    false
                }
            },
        };
        if !yes {
            if !self.json && self.consent == Consent::Never {
                say(format!("not done without -y: {question}"));
            }
            self.refused.push(question.to_owned());
        }
        yes
    }
}

/// Asks on the terminal; `None`: enough of it.
fn ask(question: &str) -> Option<bool> {
    loop {
        let mut error = std::io::stderr();
        let _ = write!(error, "{question} [y/n/q] ").and_then(|()| error.flush());
        let mut line = String::new();
        if std::io::stdin().lock().read_line(&mut line).ok()? == 0 {
            return None;
        }
        match line.trim() {
            "y" | "yes" => return Some(true),
            "n" | "no" => return Some(false),
            "q" | "quit" => return None,
            _ => {}
        }
    }
}

/// What a repair came to.
pub(super) struct Outcome {
    pub repaired: Repaired,
    /// The user ended it.
    pub ended: bool,
    /// For the JSON report.
    pub facts: Value,
}

/// Repairs, as the arguments allow.
pub(super) async fn run(
    arguments: &Arguments,
    env: &Rc<dyn Env>,
    luns: &[Rc<dyn Lun>],
    printer: &mut Printer,
) -> Result<Outcome, FsError> {
    let consent = match (arguments.yes, arguments.interactive) {
        (true, _) => Consent::Always,
        (false, true) if std::io::stdin().is_terminal() => Consent::Asked,
        (false, true) => {
            let message = "-r asks questions and standard input is no terminal; use -p or -y";
            return Err(FsError::refused(FsErrorKind::Invalid, message));
        }
        _ => Consent::Never,
    };
    let log = match &arguments.undo_file {
        Some(path) => Some(Rc::new(UndoWriter::create(path, &identities(luns).await?)?) as Rc<dyn UndoLog>),
        None => None,
    };
    let options = RepairOptions { zero_unknown: arguments.zero_unknown };
    let mut teller =
        Teller { printer, consent, json: arguments.json, repairs: Vec::new(), refused: Vec::new(), found: Vec::new() };
    let repaired = watching("fsck.vmfs", repair(env, luns, options, log, &mut teller)).await?;
    let facts = json!({
        "found": teller.found.iter().map(super::finding_facts).collect::<Vec<_>>(),
        "repairs": teller.repairs,
        "refused": teller.refused,
    });
    Ok(Outcome { repaired, ended: teller.consent == Consent::Ended, facts })
}

/// Puts back what an undo file holds.
pub(super) async fn put_back(path: &Path, env: &Rc<dyn Env>, luns: &[Rc<dyn Lun>]) -> Result<u64, FsError> {
    let mut records = UndoReader::open(path, &identities(luns).await?)?;
    watching("fsck.vmfs", undo(env, luns, &mut records)).await
}
