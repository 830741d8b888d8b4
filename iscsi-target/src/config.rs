//! Owns: what the daemon is to serve: the TOML file and the flags.
//! Promises: whatever is wrong is named with its place and the next step, before anything is opened.
//! Must not know: sockets, disks.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use iscsi::login::MAX_NAME;
use iscsi::login::chap::Credentials;
use serde::Deserialize;

/// Shortest secret (RFC 7143, 9.2.1: at least 96 bits).
const SHORTEST_SECRET: usize = 12;

/// The highest LUN.
const MOST_LUN: u16 = 255;

/// What is to be served.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Addresses to listen on.
    #[serde(default, rename = "portal")]
    pub portals: Vec<SocketAddr>,
    /// Targets.
    #[serde(default, rename = "target")]
    pub targets: Vec<TargetConfig>,
}

/// One target.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetConfig {
    /// iSCSI name.
    pub name: String,
    /// Names of initiators that may use it; none: all.
    #[serde(default)]
    pub initiators: BTreeSet<String>,
    /// What initiators have to prove.
    pub chap: Option<ChapConfig>,
    /// Its LUNs, from 0 on.
    #[serde(default, rename = "lun")]
    pub luns: Vec<LunConfig>,
}

/// Names and secrets.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChapConfig {
    /// The initiator's name.
    pub user: String,
    /// Its secret.
    pub secret: String,
    /// The target's own name, for initiators that want a proof too.
    pub target_user: Option<String>,
    /// Its secret.
    pub target_secret: Option<String>,
}

/// One LUN.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LunConfig {
    /// Its number; none: one more than the one before it in the list, from 0 on.
    pub number: Option<u16>,
    /// An image file, a block device, or a disk file of a mounted volume.
    pub path: PathBuf,
    /// Space that nobody uses is given back.
    #[serde(default)]
    pub thin: bool,
    /// Nobody may write.
    #[serde(default)]
    pub readonly: bool,
    /// The medium can be taken out and put in again by initiators.
    #[serde(default)]
    pub removable: bool,
    /// A CD-ROM: the image is an ISO file.
    #[serde(default)]
    pub cdrom: bool,
    /// An image file is read and written past the page cache.
    #[serde(default)]
    pub direct: bool,
    /// Logical block in bytes: 512 or 4096.
    pub blocksize: Option<u32>,
    /// Physical block in bytes, as initiators are told: 512 or 4096.
    pub physical: Option<u32>,
}

/// Why it cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}; check the path", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is no configuration.
    #[error("{}: {source}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: toml::de::Error,
    },
    /// A target's argument cannot be understood.
    #[error(
        "--target {argument}: {cause}; write IQN=PATH[,thin][,readonly][,removable][,cdrom][,direct][,blocksize=4096][,physical=4096]"
    )]
    Argument {
        /// What was given.
        argument: String,
        /// What is wrong with it.
        cause: String,
    },
    /// A value makes no sense.
    #[error("target {target}: {cause}")]
    Value {
        /// The target.
        target: String,
        /// What is wrong, and what to do.
        cause: String,
    },
    /// Nothing to do.
    #[error("there is no {0}; give --{0} or a --config with a [[target]]")]
    Nothing(&'static str),
}

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    /// [`ConfigError`]
    pub fn read(path: &Path) -> Result<Config, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        toml::from_str(&text).map_err(|source| ConfigError::Parse { path: path.to_owned(), source })
    }

    /// Adds `IQN=PATH[,option...]`; a name that is known already gets one more LUN.
    ///
    /// # Errors
    /// [`ConfigError::Argument`]
    pub fn add(&mut self, argument: &str) -> Result<(), ConfigError> {
        let wrong = |cause: &str| ConfigError::Argument { argument: argument.to_owned(), cause: cause.to_owned() };
        let (name, rest) = argument.split_once('=').ok_or_else(|| wrong("there is no '='"))?;
        let mut parts = rest.split(',');
        let path = parts.next().filter(|path| !path.is_empty()).ok_or_else(|| wrong("there is no path"))?;
        let mut lun = LunConfig { path: path.into(), ..LunConfig::default() };
        for option in parts {
            match option.split_once('=') {
                None if option == "thin" => lun.thin = true,
                None if option == "readonly" => lun.readonly = true,
                None if option == "removable" => lun.removable = true,
                None if option == "direct" => lun.direct = true,
                None if option == "cdrom" => lun.cdrom = true,
                Some((name @ ("blocksize" | "physical"), size)) => {
                    let bytes = size.parse().map_err(|_| wrong(&format!("{size:?} is no block size")))?;
                    *if name == "physical" { &mut lun.physical } else { &mut lun.blocksize } = Some(bytes);
                }
                _ => return Err(wrong(&format!("there is no option {option:?}"))),
            }
        }
        match self.targets.iter_mut().find(|target| target.name == name) {
            Some(target) => target.luns.push(lun),
            None => self.targets.push(TargetConfig {
                name: name.to_owned(),
                initiators: BTreeSet::new(),
                chap: None,
                luns: vec![lun],
            }),
        }
        Ok(())
    }

    /// Whether it makes sense as a whole.
    ///
    /// # Errors
    /// [`ConfigError`]
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.portals.is_empty() {
            return Err(ConfigError::Nothing("portal"));
        }
        if self.targets.is_empty() {
            return Err(ConfigError::Nothing("target"));
        }
        let mut names = BTreeSet::new();
        for target in &self.targets {
            let wrong = |cause: String| Err(ConfigError::Value { target: target.name.clone(), cause });
            if !is_iscsi_name(&target.name) {
                return wrong("this is no iSCSI name; write it like iqn.2026-01.com.example:disk1".into());
            }
            if !names.insert(&target.name) {
                return wrong("it is there twice; put all of its LUNs below one [[target]]".into());
            }
            let numbers = target.numbered();
            let mut seen = BTreeSet::new();
            if let Some((number, lun)) = numbers.iter().find(|(number, _)| *number > MOST_LUN || !seen.insert(*number))
            {
                let path = lun.path.display();
                return wrong(format!(
                    "{path} is to be LUN {number}; give each LUN a number of its own, 0 to {MOST_LUN}"
                ));
            }
            if target.luns.is_empty() || target.luns.len() > 256 {
                return wrong(format!("it has {} LUNs; give 1 to 256", target.luns.len()));
            }
            for lun in &target.luns {
                if lun.cdrom && (lun.thin || lun.blocksize.or(lun.physical).is_some()) {
                    return wrong(format!(
                        "{}: a CD-ROM is neither thin nor has it another blocksize",
                        lun.path.display()
                    ));
                }
                for (name, block) in [("blocksize", lun.blocksize), ("physical", lun.physical)] {
                    if !matches!(block, None | Some(512 | 4096)) {
                        return wrong(format!("{}: {name} is 512 or 4096", lun.path.display()));
                    }
                }
            }
            if let Some(chap) = &target.chap {
                let secrets = [Some(&chap.secret), chap.target_secret.as_ref()];
                if secrets.into_iter().flatten().any(|secret| secret.len() < SHORTEST_SECRET) {
                    return wrong(format!("a secret has at least {SHORTEST_SECRET} characters"));
                }
                if chap.target_user.is_some() != chap.target_secret.is_some() {
                    return wrong("target_user and target_secret belong together; give both or none".into());
                }
                if chap.target_secret.as_ref() == Some(&chap.secret) {
                    return wrong(
                        "both sides have the same secret; give the target one of its own (RFC 7143, 9.2.1)".into(),
                    );
                }
            }
        }
        Ok(())
    }
}

impl TargetConfig {
    /// Its LUNs with their numbers.
    pub fn numbered(&self) -> Vec<(u16, &LunConfig)> {
        let mut next = 0u16;
        let number = |lun: &'_ LunConfig| {
            let number = lun.number.unwrap_or(next);
            next = number.saturating_add(1);
            number
        };
        self.luns.iter().map(number).zip(&self.luns).collect()
    }
}

impl LunConfig {
    /// The same LUN, whatever its number?
    pub fn shows_the_same(&self, other: &LunConfig) -> bool {
        LunConfig { number: None, ..self.clone() } == LunConfig { number: None, ..other.clone() }
    }
}

impl ChapConfig {
    /// For a login.
    pub fn credentials(&self) -> Credentials {
        Credentials {
            initiator: (self.user.clone(), self.secret.clone()),
            target: self.target_user.clone().zip(self.target_secret.clone()),
        }
    }
}

/// An iSCSI name (RFC 7143, 4.2.7): `iqn.`, `eui.` or `naa.` and characters of names, in lower case.
fn is_iscsi_name(name: &str) -> bool {
    let rest = ["iqn.", "eui.", "naa."].iter().find_map(|kind| name.strip_prefix(kind));
    let allowed = |c: char| {
        c.is_ascii_lowercase() || c.is_ascii_digit() || "-.:".contains(c) || (!c.is_ascii() && !c.is_uppercase())
    };
    name.len() <= MAX_NAME && rest.is_some_and(|rest| !rest.is_empty() && rest.chars().all(allowed))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn portal() -> Config {
        Config { portals: vec!["127.0.0.1:3260".parse().unwrap()], targets: Vec::new() }
    }

    #[test]
    fn a_name_given_again_gets_one_more_lun() {
        let mut config = portal();
        config.add("iqn.2026-01.test:a=/x/one.img,thin").unwrap();
        config.add("iqn.2026-01.test:b=/x/two.img").unwrap();
        config.add("iqn.2026-01.test:a=/x/three=3.img,readonly,physical=512,blocksize=4096").unwrap();
        config.check().unwrap();
        assert_eq!(config.targets.len(), 2);
        let luns = &config.targets[0].luns;
        assert_eq!((luns[0].thin, luns[0].readonly, luns[0].blocksize), (true, false, None));
        assert_eq!(luns[1].path, Path::new("/x/three=3.img"));
        assert_eq!((luns[1].thin, luns[1].readonly, luns[1].blocksize), (false, true, Some(4096)));
        assert_eq!(luns[1].physical, Some(512));
    }

    #[test]
    fn a_lun_has_the_number_that_it_is_given_or_the_next_one() {
        let text = "[[target]]\nname = 'iqn.a'\nlun = [{ path = '/a' }, { path = '/b', number = 7 }, { path = '/c' }]";
        let mut config: Config = toml::from_str(text).unwrap();
        config.portals = portal().portals;
        config.check().unwrap();
        let numbers: Vec<u16> = config.targets[0].numbered().iter().map(|(number, _)| *number).collect();
        assert_eq!(numbers, [0, 7, 8]);
        for wrong in [0, 8, 256] {
            config.targets[0].luns[1].number = Some(wrong);
            assert_eq!(config.check().is_err(), wrong != 8, "{wrong}");
        }
        let mut other = config.targets[0].luns[0].clone();
        other.number = Some(3);
        assert!(other.shows_the_same(&config.targets[0].luns[0]));
        other.direct = true;
        assert!(!other.shows_the_same(&config.targets[0].luns[0]));
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let mut config = portal();
        for (argument, word) in
            [("iqn.x", "'='"), ("iqn.x=", "path"), ("iqn.x=/a,fat", "fat"), ("iqn.x=/a,blocksize=x", "block size")]
        {
            let told = config.add(argument).unwrap_err().to_string();
            assert!(told.contains(word) && told.contains(argument), "{told}");
        }
        assert!(config.check().unwrap_err().to_string().contains("--target"));
        let told = |text: &str| {
            let mut config: Config = toml::from_str(text).unwrap();
            config.portals = portal().portals;
            config.check().unwrap_err().to_string()
        };
        assert!(told("[[target]]\nname = 'Disk'\n[[target.lun]]\npath = '/a'").contains("iqn.2026-01"));
        assert!(told("[[target]]\nname = 'iqn.a'").contains("0 LUNs"));
        let chap = |more: &str| {
            format!("[[target]]\nname = 'iqn.a'\nlun = [{{ path = '/a' }}]\n[target.chap]\nuser = 'u'\n{more}")
        };
        assert!(told(&chap("secret = 'short'")).contains("12 characters"));
        assert!(told(&chap("secret = 'long-enough-1'\ntarget_user = 'd'")).contains("belong together"));
        let same = "secret = 'long-enough-1'\ntarget_user = 'd'\ntarget_secret = 'long-enough-1'";
        assert!(told(&chap(same)).contains("same secret"));
        assert!(toml::from_str::<Config>("portals = 3").is_err());
    }
}
