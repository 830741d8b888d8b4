//! Owns: a new configuration in the place of the one that is served.
//! Promises: all of it or nothing; no session is dropped; nothing that somebody uses is taken away.
//! Must not know: where configurations come from.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;

use scsi::Lun;

use crate::config::{Config, LunConfig, TargetConfig};
use crate::server::{OpenLun, ServeError, Server, TargetEntry, open_lun, open_target};

/// Why the configuration stays as it was.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// Portals are the ports of all targets.
    #[error("the portals have changed; that takes a restart of iscsi-target")]
    Portals,
    /// Somebody uses what is to go.
    #[error("target {target}: {what} cannot go: {by}; end that first")]
    InUse {
        /// The target.
        target: String,
        /// What was to be taken away.
        what: String,
        /// Who uses it.
        by: String,
    },
    /// A LUN that stays is to be something else.
    #[error(
        "target {target}: LUN {lun} ({}) cannot change while it is served; take it out, reload, add it again and reload", path.display()
    )]
    Changed {
        /// The target.
        target: String,
        /// The LUN.
        lun: u16,
        /// What stores it.
        path: PathBuf,
    },
    /// Something new cannot be served.
    #[error("{0}")]
    Serve(#[from] ServeError),
    /// Two at once.
    #[error("another reload is under way; try again when it has ended")]
    Busy,
}

/// What becomes of one target.
struct Change<'a> {
    entry: Rc<TargetEntry>,
    config: &'a TargetConfig,
    gone: Vec<u16>,
    new: Vec<OpenLun>,
}

impl Server {
    /// Serves `config` from now on. Returns what is new, gone and changed, a line each.
    ///
    /// # Errors
    /// [`ReloadError`]: then everything is as it was.
    pub async fn reload(&self, config: &Config) -> Result<Vec<String>, ReloadError> {
        if self.reloads.replace(true) {
            return Err(ReloadError::Busy);
        }
        let done = self.replace(config).await;
        self.reloads.set(false);
        done
    }

    async fn replace(&self, config: &Config) -> Result<Vec<String>, ReloadError> {
        if config.portals != self.configured_portals {
            return Err(ReloadError::Portals);
        }
        let known = self.targets.borrow().clone();
        let is_wanted = |entry: &Rc<TargetEntry>| config.targets.iter().any(|target| target.name == entry.name);
        let gone: Vec<_> = known.iter().filter(|entry| !is_wanted(entry)).cloned().collect();
        let mut changes = Vec::new();
        for target in &config.targets {
            if let Some(entry) = known.iter().find(|entry| entry.name == target.name) {
                changes.push(Change {
                    entry: entry.clone(),
                    config: target,
                    gone: entry.gone(target)?,
                    new: Vec::new(),
                });
            }
        }
        self.check_unused(&gone, &changes)?;
        // What takes time and can fail, with nothing changed yet.
        let mut new = Vec::new();
        for target in config.targets.iter().filter(|target| !known.iter().any(|entry| entry.name == target.name)) {
            new.push(Rc::new(open_target(target, self.portals.len() as u16, self.state.as_deref()).await?));
        }
        for change in &mut changes {
            for (number, lun) in change.config.numbered() {
                if !change.entry.luns.borrow().contains_key(&number) {
                    change.new.push(open_lun(&change.entry.name, number, lun, self.state.as_deref()).await?);
                }
            }
        }
        // Somebody may have come meanwhile.
        self.check_unused(&gone, &changes)?;
        Ok(self.apply(gone, changes, new).await)
    }

    async fn apply(
        &self,
        gone: Vec<Rc<TargetEntry>>,
        changes: Vec<Change<'_>>,
        new: Vec<Rc<TargetEntry>>,
    ) -> Vec<String> {
        let mut done = Vec::new();
        self.targets.borrow_mut().retain(|entry| !gone.iter().any(|other| Rc::ptr_eq(entry, other)));
        for entry in gone {
            let luns: Vec<u16> = entry.luns.borrow().keys().copied().collect();
            for lun in luns {
                entry.take_out(lun).await;
            }
            entry.end();
            done.push(format!("target {} is gone", entry.name));
        }
        for change in changes {
            let name = &change.entry.name;
            if change.entry.admit_only(change.config) {
                done.push(format!("target {name}: who may log in has changed"));
            }
            for lun in change.gone {
                change.entry.take_out(lun).await;
                done.push(format!("target {name}: LUN {lun} is gone"));
            }
            for lun in change.new {
                done.push(format!("target {name}: LUN {} is {}", lun.number, lun.config.path.display()));
                change.entry.put_in(lun);
            }
        }
        for entry in new {
            done.push(format!("target {} is new", entry.name));
            self.targets.borrow_mut().push(entry);
        }
        done
    }

    fn check_unused(&self, gone: &[Rc<TargetEntry>], changes: &[Change<'_>]) -> Result<(), ReloadError> {
        let in_use = |entry: &Rc<TargetEntry>, what: String, luns: &mut dyn Iterator<Item = u16>| {
            let refused = |by| Err(ReloadError::InUse { target: entry.name.clone(), what: what.clone(), by });
            if let Some(session) = self.sessions().iter().find(|session| session.uses(entry)) {
                return refused(format!("initiator {} is logged in from {}", session.initiator, session.entrance.peer));
            }
            for lun in luns {
                let view = entry.units.reservations(Lun(lun)).unwrap_or_default();
                if let Some(registrant) = view.registrants.first() {
                    return refused(format!("key {:#x} is registered with LUN {lun}", registrant.key));
                }
            }
            Ok(())
        };
        for entry in gone {
            let luns: Vec<u16> = entry.luns.borrow().keys().copied().collect();
            in_use(entry, "it".to_owned(), &mut luns.into_iter())?;
        }
        for change in changes {
            for lun in &change.gone {
                in_use(&change.entry, format!("LUN {lun}"), &mut std::iter::once(*lun))?;
            }
        }
        Ok(())
    }
}

impl TargetEntry {
    /// The LUNs that `config` has no more.
    fn gone(&self, config: &TargetConfig) -> Result<Vec<u16>, ReloadError> {
        let wanted: BTreeMap<u16, &LunConfig> = config.numbered().into_iter().collect();
        let mut gone = Vec::new();
        for (number, lun) in self.luns.borrow().iter() {
            match wanted.get(number) {
                None => gone.push(*number),
                Some(other) if !other.shows_the_same(lun) => {
                    let (target, path) = (self.name.clone(), lun.path.clone());
                    return Err(ReloadError::Changed { target, lun: *number, path });
                }
                Some(_) => {}
            }
        }
        Ok(gone)
    }

    /// From now on a login needs what `config` says. `true`: that is something else than before.
    fn admit_only(&self, config: &TargetConfig) -> bool {
        let credentials = config.chap.as_ref().map(|chap| chap.credentials());
        let before =
            (self.initiators.replace(config.initiators.clone()), self.credentials.replace(credentials.clone()));
        before != (config.initiators.clone(), credentials)
    }

    pub(crate) fn put_in(&self, lun: OpenLun) {
        let number = Lun(lun.number);
        self.units.insert(number, lun.disk);
        if let Some(restored) = lun.store {
            // The record was read and checked when the LUN was opened.
            if let Err(error) = restored.keep_for(&self.units, number) {
                tracing::error!(target = %self.name, lun = lun.number, %error, "the reservations cannot be restored");
            }
        }
        self.luns.borrow_mut().insert(lun.number, lun.config);
    }

    async fn take_out(&self, lun: u16) {
        self.luns.borrow_mut().remove(&lun);
        let Some(disk) = self.units.remove(Lun(lun)).await else { return };
        if let Err(error) = disk.flush().await {
            tracing::error!(target = %self.name, lun, %error, "a disk that was taken out cannot be flushed");
        }
    }
}
