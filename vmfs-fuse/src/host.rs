//! Owns: who this host is when nobody says: UUID, boot id and name.
//! Promises: the UUID stays the same over reboots; two mounts without `--host-id` have the same one and different slots.
//! Must not know: slots.

use std::fs;
use std::io;

use vmfs_core::slot::HostIdentity;
use vmfs_core::units::Uuid;

/// The identity of this host, with what was asked for in place of what the machine says.
pub fn identity(id: Option<Uuid>, name: Option<String>) -> io::Result<HostIdentity> {
    let host = match id {
        Some(id) => id,
        None => host_of_machine(&machine_id()?),
    };
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let boot = Uuid::parse(text.trim()).ok_or_else(|| io::Error::other(format!("the boot id {text:?} is no UUID")))?;
    let name = name.unwrap_or_else(|| rustix::system::uname().nodename().to_string_lossy().into_owned());
    Ok(HostIdentity { host, boot, name })
}

fn machine_id() -> io::Result<String> {
    for path in ["/etc/machine-id", "/var/lib/dbus/machine-id"] {
        let id = fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        if id.len() == 32 {
            return Ok(id);
        }
    }
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        "this machine has no /etc/machine-id: give --host-id, a UUID of its own",
    ))
}

/// A UUID made of the machine id without showing it (machine-id(5)): FNV-1a of 128 bits, marked as a UUID of version 8.
fn host_of_machine(id: &str) -> Uuid {
    const OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    let bytes = b"vmfs host ".iter().chain(id.as_bytes());
    let hash = bytes.fold(OFFSET, |hash, byte| (hash ^ u128::from(*byte)).wrapping_mul(PRIME));
    let mut uuid = hash.to_be_bytes();
    uuid[6] = 0x80 | (uuid[6] & 0x0f);
    uuid[8] = 0x80 | (uuid[8] & 0x3f);
    Uuid(uuid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_has_one_host_uuid_that_does_not_show_its_machine_id() {
        let id = "3d1219c7c4c5404aaa1f6d2a48adfda4";
        let host = host_of_machine(id);
        assert_eq!(host, host_of_machine(id));
        assert_ne!(host, host_of_machine("3d1219c7c4c5404aaa1f6d2a48adfda5"));
        assert!(host.to_string().as_bytes()[14] == b'8' && !host.to_string().contains("3d1219c7"));
    }

    #[test]
    fn what_was_asked_for_counts() {
        let id = Uuid([9; 16]);
        let identity = identity(Some(id), Some("esx-a".to_owned())).unwrap();
        assert_eq!((identity.host, identity.name.as_str()), (id, "esx-a"));
        assert_ne!(identity.boot, Uuid::default());
    }
}
