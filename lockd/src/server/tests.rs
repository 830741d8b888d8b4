use std::io::Read;

use super::*;
use crate::client::Connection;

struct Echo {
    host: Uuid,
    gone: Mutex<Vec<ClientId>>,
}

fn memfd(text: &str) -> OwnedFd {
    let file = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::io::pwrite(&file, text.as_bytes(), 0).unwrap();
    file
}

impl Service for Echo {
    fn identity(&self) -> (Uuid, Uuid) {
        (Uuid([1; 16]), self.host)
    }

    fn attach(&self, _: ClientId, ticket: Ticket) -> Result<(Attachment, [OwnedFd; 3]), Refusal> {
        if ticket != Ticket([7; 16]) {
            return Err(Refusal { errno: libc::ESTALE, message: "no such ticket".to_owned() });
        }
        Ok((Attachment { lock_lun: 1, luns: vec![] }, ["gate", "revoke", "recalls"].map(memfd)))
    }

    fn recalled(&self, _: ClientId, _: Ticket, let_go: u64) -> Result<Option<Recall>, Refusal> {
        Ok((let_go == 0).then_some(Recall { number: 3, offset: 4096, length: 8192 }))
    }

    fn open_lun(&self, _: ClientId, _: Ticket, lun: u8) -> Result<OwnedFd, Refusal> {
        Ok(memfd(&format!("lun {lun}")))
    }

    fn open_session(&self, _: ClientId, _: Ticket, lun: u8) -> Result<(u64, Pass), Refusal> {
        Ok((lun.into(), Pass("secret".to_owned())))
    }

    fn confirm_session(
        &self,
        _: ClientId,
        _: Ticket,
        lun: u8,
        session: u64,
        place: Option<String>,
    ) -> Result<(), Refusal> {
        match (u64::from(lun) == session, place.as_deref()) {
            (true, Some("1")) => Ok(()),
            _ => Err(Refusal { errno: libc::ESTALE, message: "no such session".to_owned() }),
        }
    }

    fn administer(&self, what: AdminRequest, progress: &mut dyn FnMut(u64, u64)) -> Result<serde_json::Value, Refusal> {
        progress(1, 2);
        match what {
            AdminRequest::Status => Ok(serde_json::json!({"fine": true})),
            _ => Ok(serde_json::Value::String("x".repeat(rights::MAX_MESSAGE))),
        }
    }

    fn gone(&self, client: ClientId) {
        self.gone.lock().push(client);
    }
}

fn text(descriptor: OwnedFd) -> String {
    let mut text = String::new();
    let mut file = File::from(descriptor);
    std::io::Seek::rewind(&mut file).unwrap();
    file.read_to_string(&mut text).unwrap();
    text
}

fn echo(host: u8) -> Arc<Echo> {
    Arc::new(Echo { host: Uuid([host; 16]), gone: Mutex::new(vec![]) })
}

#[test]
fn a_client_gets_answers_descriptors_and_refusals() {
    let base = tempfile::tempdir().unwrap();
    let service = echo(2);
    let server = Server::start_below(base.path(), service.clone()).unwrap();
    {
        let mut connection = Connection::open(server.path()).unwrap();
        let (attachment, descriptors) = connection.attach(Ticket([7; 16])).unwrap();
        assert_eq!((attachment.lock_lun, descriptors.map(text)), (1, ["gate", "revoke", "recalls"].map(str::to_owned)));
        let (session, pass) = connection.open_session(Ticket([7; 16]), 9).unwrap();
        assert_eq!((session, pass.0.as_str()), (9, "secret"));
        connection.confirm_session(Ticket([7; 16]), 9, session, Some("1".to_owned())).unwrap();
        let refused = connection.confirm_session(Ticket([7; 16]), 9, 8, None).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::ESTALE));
        let recall = connection.recalled(Ticket([7; 16]), 0).unwrap();
        assert_eq!(recall, Some(Recall { number: 3, offset: 4096, length: 8192 }));
        assert_eq!(connection.recalled(Ticket([7; 16]), 3).unwrap(), None);
        assert_eq!(text(connection.open_lun(Ticket([7; 16]), 9).unwrap()), "lun 9");
        let error = connection.attach(Ticket([8; 16])).unwrap_err();
        assert_eq!((error.raw_os_error(), error.to_string()), (Some(libc::ESTALE), "no such ticket".to_owned()));
        let mut seen = vec![];
        let value = connection.administer(AdminRequest::Status, &mut |done, total| seen.push((done, total))).unwrap();
        assert_eq!((value["fine"].as_bool(), seen), (Some(true), vec![(1, 2)]));
        let dump = AdminRequest::Dump { file: crate::protocol::NameIn { directory: Ticket([0; 16]), name: vec![] } };
        let error = connection.administer(dump, &mut |_, _| ()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE));
    }
    let path = server.path().to_owned();
    drop(server);
    assert_eq!(service.gone.lock().len(), 1);
    assert!(!path.exists());
}

#[test]
fn garbage_and_requests_before_hello_are_refused_and_the_connection_lives_on() {
    let base = tempfile::tempdir().unwrap();
    let server = Server::start_below(base.path(), echo(2)).unwrap();
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    connect(&socket, &SocketAddrUnix::new(server.path()).unwrap()).unwrap();
    let mut buffer = Vec::new();
    let mut ask = |bytes: &[u8]| {
        rights::send(&socket, bytes, &[]).unwrap();
        rights::receive(&socket, &mut buffer).unwrap().unwrap();
        decode::<Answer>(&buffer).unwrap()
    };
    let early = ask(&encode(&Request::OpenLun { ticket: Ticket([0; 16]), lun: 1 }));
    assert!(matches!(early, Answer::Refused { errno: libc::EPROTO, .. }));
    assert!(matches!(ask(b"\xff{{{"), Answer::Refused { errno: libc::EPROTO, .. }));
    assert!(matches!(ask(&encode(&Request::Hello { version: 99 })), Answer::Refused { .. }));
    assert!(matches!(ask(&encode(&Request::Hello { version: PROTOCOL_VERSION })), Answer::Welcome { .. }));
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let base = tempfile::tempdir().unwrap();
    let first = Server::start_below(base.path(), echo(2)).unwrap();
    let second = Server::start_below(base.path(), echo(2)).unwrap();
    assert!(second.path().to_str().unwrap().ends_with(".2.sock"), "{}", second.path().display());
    let path = first.path().to_owned();
    drop(first);
    // What a killed mount leaves: a file that nobody listens at.
    let left = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    bind(&left, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    drop(left);
    let third = Server::start_below(base.path(), echo(2)).unwrap();
    assert_eq!(third.path(), path);
    Connection::open(third.path()).unwrap();
    Connection::open(second.path()).unwrap();
}

#[test]
fn a_folder_that_others_can_write_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let base = tempfile::tempdir().unwrap();
    fs::set_permissions(base.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let error = Server::start_below(base.path(), echo(2)).err().unwrap();
    assert!(error.to_string().contains("only this user"), "{error}");
}
