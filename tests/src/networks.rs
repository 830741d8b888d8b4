//! Owns: machines on a network of their own: network namespaces, joined by a switch, whose links can be cut.
//! Promises: what was made is removed, also when a test panics; the network of this machine is not touched.
//! Must not know: what runs in them.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::harness::{output, run, system};

/// Networks of this process so far: their names are told apart by it.
static MADE: AtomicU32 = AtomicU32::new(0);

/// A switch with a machine for the storage, and machines for hosts.
pub struct Network {
    /// Namespace of the switch and the storage.
    storage: String,
    hosts: Vec<String>,
}

impl Network {
    /// With so many hosts.
    pub fn new(hosts: u8) -> Network {
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let name = |what: &str| format!("vmfs-{}-{number}-{what}", std::process::id());
        // Made before anything can fail, so that it is removed then.
        let network = Network { storage: name("s"), hosts: (1..=hosts).map(|host| name(&host.to_string())).collect() };
        let ip = |arguments: &[&str]| drop(run(system("ip").args(arguments)));
        ip(&["netns", "add", &network.storage]);
        let inside = |arguments: &[&str]| ip(&[&["-n", network.storage.as_str()], arguments].concat());
        inside(&["link", "set", "lo", "up"]);
        inside(&["link", "add", "name", "switch", "type", "bridge"]);
        inside(&["addr", "add", &format!("{}/24", Network::ADDRESS), "dev", "switch"]);
        inside(&["link", "set", "switch", "up"]);
        for (nth, host) in network.hosts.iter().enumerate() {
            let port = format!("port{}", nth + 1);
            ip(&["netns", "add", host]);
            inside(&["link", "add", "name", &port, "type", "veth", "peer", "name", "up0", "netns", host]);
            inside(&["link", "set", &port, "master", "switch", "up"]);
            ip(&["-n", host, "addr", "add", &format!("10.0.0.{}/24", nth + 1), "dev", "up0"]);
            ip(&["-n", host, "link", "set", "up0", "up"]);
        }
        network
    }

    /// Address of the storage.
    pub const ADDRESS: &str = "10.0.0.100";

    /// A command that runs where the storage is.
    pub fn at_storage(&self, program: &Command) -> Command {
        within(&self.storage, program)
    }

    /// Whether it has a host of this number.
    pub fn has_host(&self, host: u8) -> bool {
        (1..=self.hosts.len()).contains(&usize::from(host))
    }

    /// A command that runs on a host, from 1 on.
    pub fn at_host(&self, host: u8, program: &Command) -> Command {
        within(&self.hosts[usize::from(host) - 1], program)
    }

    /// Cuts a host's link, or mends it.
    pub fn set_link(&self, host: u8, up: bool) {
        let port = format!("port{host}");
        run(system("ip").args(["-n", &self.storage, "link", "set", &port, if up { "up" } else { "down" }]));
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // A namespace goes when its last process has ended; its name goes now.
        for name in self.hosts.iter().chain([&self.storage]) {
            let _ = output(system("ip").args(["netns", "del", name]));
        }
    }
}

/// The same program and arguments, in a network namespace. Mounts stay in this machine's tree, unlike with `ip netns exec`.
fn within(namespace: &str, program: &Command) -> Command {
    let mut command = system("nsenter");
    command.arg(format!("--net=/run/netns/{namespace}")).arg(program.get_program()).args(program.get_args());
    command
}
