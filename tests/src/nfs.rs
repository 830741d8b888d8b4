//! Owns: nfs-ganesha as a server of a test, for NFSv3 and NFSv4.1, with its port mapper, on the storage of a network.
//! Promises: it ends with the test; this machine's own port mapper and `/run` are not touched.
//! Must not know: what is stored.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use crate::harness::{output, signal, system, wait_for};
use crate::networks::Network;

/// How long the server keeps what is open by NFSv4.1 for a client that is silent.
pub const LEASE: Duration = Duration::from_secs(20);

/// A running server. Its export is a folder of this machine.
pub struct Ganesha<'a> {
    network: &'a Network,
    folder: PathBuf,
    child: Option<Child>,
}

impl<'a> Ganesha<'a> {
    /// Exports `folder`/export, with its own files beside that.
    pub fn start(network: &'a Network, folder: &Path) -> Ganesha<'a> {
        let mut server = Ganesha { network, folder: folder.to_owned(), child: None };
        fs::create_dir_all(server.export()).expect("a folder can be made");
        fs::create_dir_all(server.folder.join("clients")).expect("a folder can be made");
        let path = server.export();
        let configuration = format!(
            "NFS_CORE_PARAM {{ Protocols = 3, 4; Bind_addr = {address}; NFS_Port = 2049; MNT_Port = 20048; Enable_NLM = false;\n\
             Enable_RQUOTA = false; Enable_UDP = false; fsid_device = true; }}\n\
             NFS_KRB5 {{ Active_krb5 = false; }}\n\
             NFSv4 {{ Graceless = false; Lease_Lifetime = {lease}; Grace_Period = {lease}; Minor_Versions = 1; RecoveryBackend = fs; }}\n\
             LOG {{ Default_Log_Level = EVENT; }}\n\
             EXPORT {{ Export_Id = 1; Path = {path}; Pseudo = /ds; Access_Type = RW; Squash = No_Root_Squash; SecType = sys;\n\
             Protocols = 3, 4; Transports = TCP; PrivilegedPort = true; FSAL {{ Name = VFS; }} }}\n",
            address = Network::ADDRESS,
            lease = LEASE.as_secs(),
            path = path.display(),
        );
        fs::write(server.folder.join("ganesha.conf"), configuration).expect("a file can be written");
        server.run();
        server
    }

    /// The exported folder.
    pub fn export(&self) -> PathBuf {
        self.folder.join("export")
    }

    /// The URL of a file in it.
    pub fn url(&self, name: &str) -> PathBuf {
        format!("nfs://{}{}/{name}", Network::ADDRESS, self.export().display()).into()
    }

    /// The URL of a file in it by NFSv4.1.
    pub fn url_v41(&self, name: &str) -> PathBuf {
        format!("nfs://{}/ds/{name}?version=4.1", Network::ADDRESS).into()
    }

    /// Starts it, as at first; it knows who had files open by NFSv4.1 when it was ended.
    pub fn run(&mut self) {
        let at = |name: &str| self.folder.join(name).display().to_string();
        // In a mount namespace with a /run of its own, in a process namespace that ends with its first process.
        let script = format!(
            "mount -t tmpfs tmpfs /run && mkdir -p /run/ganesha /run/sendsigs.omit.d /var/lib/nfs/ganesha && \
             mount --bind {} /var/lib/nfs/ganesha && rpcbind -w && \
             exec ganesha.nfsd -F -f {} -L {} -p /run/ganesha/pid -N NIV_EVENT",
            at("clients"),
            at("ganesha.conf"),
            at("ganesha.log")
        );
        let mut unshare = system("unshare");
        unshare.args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"]);
        unshare.args(["sh", "-c", &script]);
        let log = File::options().create(true).append(true).open(self.folder.join("server.log")).expect("a log");
        let mut command = self.network.at_storage(&unshare);
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a log")).stderr(log);
        self.child = Some(command.spawn().expect("the server starts"));
        let mut asked = system("rpcinfo");
        asked.args(["-T", "tcp", Network::ADDRESS, "100005", "3"]);
        let mut asked = self.network.at_storage(&asked);
        wait_for("ganesha answers", || {
            let ended = self.child.as_mut().and_then(|child| child.try_wait().ok().flatten());
            assert!(ended.is_none(), "ganesha has ended: {}", self.log());
            output(&mut asked).status.success()
        });
    }

    /// What it said.
    pub fn log(&self) -> String {
        ["server.log", "ganesha.log"]
            .map(|name| fs::read_to_string(self.folder.join(name)).unwrap_or_default())
            .concat()
    }

    /// Ends it at once, whatever it does. Its ports are free then.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // The first process of the namespace goes; its parent ends after all the others there have ended too.
            let first = fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).unwrap_or_default();
            match first.trim().parse() {
                Ok(first) => signal(first, libc::SIGKILL),
                Err(_) => drop(child.kill()),
            }
            let _ = child.wait();
        }
    }
}

impl Drop for Ganesha<'_> {
    fn drop(&mut self) {
        self.kill();
    }
}
