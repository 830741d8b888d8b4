//! Owns: the I/O controller as the host sees it: its state, what it says of itself, its configuration pages, its events.
//! Promises: every message but task management gets exactly one reply, at once; a message in the wrong state says so.
//! Must not know: registers, threads, targets, how replies travel.

use vm_memory::{Bytes, GuestAddress};

use super::config_pages::{PageAccess, PageRequest, Pages, TARGETS};
use super::messages::{FRAME_SIZE, Frame, IocStatus, Message, function};
use super::queues::Setup;
use crate::hba::GuestMemory;
use crate::hba::queue::OWN_TARGET;

/// MPI version 1.2: firmware versions of 32 bits, no high-priority queue, no host page buffer.
const MESSAGE_VERSION: u16 = 0x0102;
/// SCSI initiator firmware for the 53C1030, revision C0.
const PRODUCT: u16 = 0x0104;
/// The firmware's version as ESX shows it.
const FIRMWARE_VERSION: u32 = 0x0103_2920;
/// Requests that the host may have outstanding.
const CREDITS: u16 = 256;
/// Replies that the host should make room for.
const REPLY_DEPTH: u16 = 256;
/// Chain elements of one request.
const CHAIN_DEPTH: u8 = 0x80;

/// Fault code: a request frame could not be read (MPI, "request message PCI bus fault").
pub(super) const FAULT_REQUEST: u16 = 0x8112;
/// Fault code: a reply frame could not be written (MPI, "reply message PCI bus fault").
pub(super) const FAULT_REPLY: u16 = 0x8114;
/// Fault code of our own: more requests than the FIFO holds.
pub(super) const FAULT_OVERFLOW: u16 = 0x8101;

/// Events that the host is told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// The controller has reset the bus.
    BusReset = 0x04,
    /// Devices have come or gone.
    Rescan = 0x06,
    /// Notification has been switched on or off.
    Change = 0x0A,
}

/// The state that the doorbell shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// It takes IOC INIT and what tells about it.
    Ready,
    /// It takes requests.
    Operational,
    /// It does nothing until it is reset; the code says why.
    Fault(u16),
}

/// See the module.
pub(super) struct Ioc {
    state: State,
    who_init: u8,
    reply_frame_size: u16,
    setup: Setup,
    /// The context of EVENT NOTIFICATION, while events are switched on.
    events: Option<u32>,
    pages: Pages,
}

impl Ioc {
    pub(super) fn new() -> Self {
        Self {
            state: State::Ready,
            who_init: 0,
            reply_frame_size: 0,
            setup: Setup::default(),
            events: None,
            pages: Pages::new(),
        }
    }

    /// As after a reset of the message unit: pages keep what was written into them.
    pub(super) fn reset(&mut self) {
        (self.state, self.who_init, self.reply_frame_size) = (State::Ready, 0, 0);
        (self.setup, self.events) = (Setup::default(), None);
    }

    /// As after power-on.
    pub(super) fn power_on(&mut self) {
        *self = Self::new();
    }

    pub(super) fn is_operational(&self) -> bool {
        self.state == State::Operational
    }

    /// Stops the controller; the first fault stays.
    pub(super) fn fault(&mut self, code: u16) {
        if !matches!(self.state, State::Fault(_)) {
            self.state = State::Fault(code);
        }
    }

    /// The doorbell register; `word` is what a handshake shows at the moment.
    pub(super) fn doorbell(&self, word: Option<u16>) -> u32 {
        let (state, code) = match self.state {
            State::Ready => (1, 0),
            State::Operational => (2, 0),
            State::Fault(code) => (4, code),
        };
        let active = u32::from(word.is_some()) << 27;
        state << 28 | active | u32::from(self.who_init & 7) << 24 | u32::from(word.unwrap_or(code))
    }

    /// A message that tells of `event`, if the host wants to know.
    pub(super) fn event(&self, event: Event) -> Option<Message> {
        self.events.filter(|_| self.is_operational()).map(|context| event_message(event, context, 0, 0))
    }

    /// Answers a message. IOC INIT leaves what the FIFOs need to know in the second part.
    pub(super) fn answer(&mut self, request: &Frame, memory: &GuestMemory) -> (Message, Option<Setup>) {
        let always = matches!(request.function(), function::IOC_FACTS | function::PORT_FACTS | function::IOC_INIT);
        if !always && !self.is_operational() || matches!(self.state, State::Fault(_)) {
            return (Message::to(request, 5, IocStatus::InvalidState), None);
        }
        let message = match request.function() {
            function::IOC_INIT => return self.init(request),
            function::IOC_FACTS => self.facts(request),
            function::PORT_FACTS => port_facts(request),
            function::PORT_ENABLE => {
                let mut reply = Message::to(request, 5, IocStatus::Success);
                *reply.set_byte(0x06, request.byte(0x06))
            }
            function::EVENT_NOTIFICATION => self.event_notification(request),
            function::CONFIG => self.config(request, memory),
            function::EVENT_ACK => Message::to(request, 5, IocStatus::Success),
            // There is no firmware to be changed or read.
            function::FIRMWARE_DOWNLOAD => Message::to(request, 5, IocStatus::InvalidFunction),
            function::FIRMWARE_UPLOAD => Message::to(request, 6, IocStatus::InvalidFunction),
            _ => Message::to(request, 5, IocStatus::InvalidFunction),
        };
        (message, None)
    }

    fn init(&mut self, request: &Frame) -> (Message, Option<Setup>) {
        self.state = State::Operational;
        self.who_init = request.byte(0x00);
        self.reply_frame_size = request.half(0x0C);
        self.setup = Setup {
            frames_high: request.word(0x10),
            sense_high: request.word(0x14),
            reply_frame_size: usize::from(self.reply_frame_size),
        };
        let mut reply = Message::to(request, 5, IocStatus::Success);
        reply.set_byte(0x00, self.who_init).set_byte(0x05, request.byte(0x05)).set_byte(0x06, request.byte(0x06));
        (reply, Some(self.setup))
    }

    fn facts(&self, request: &Frame) -> Message {
        let mut reply = Message::to(request, 15, IocStatus::Success);
        reply
            .set_half(0x00, MESSAGE_VERSION)
            .set_byte(0x14, CHAIN_DEPTH)
            .set_byte(0x15, self.who_init)
            // Linux divides by the block size.
            .set_byte(0x16, 8)
            .set_half(0x18, REPLY_DEPTH)
            .set_half(0x1A, (FRAME_SIZE / 4) as u16)
            .set_half(0x1E, PRODUCT)
            .set_word(0x20, self.setup.frames_high)
            .set_half(0x24, CREDITS)
            .set_byte(0x26, 1)
            .set_byte(0x27, u8::from(self.events.is_some()))
            .set_word(0x28, self.setup.sense_high)
            .set_half(0x2C, self.reply_frame_size)
            .set_byte(0x2E, TARGETS)
            .set_byte(0x2F, 1)
            .set_word(0x38, FIRMWARE_VERSION);
        reply
    }

    fn event_notification(&mut self, request: &Frame) -> Message {
        let switch = request.byte(0x00);
        self.events = (switch & 1 != 0).then(|| request.context());
        event_message(Event::Change, request.context(), request.byte(0x07), switch.into())
    }

    fn config(&mut self, request: &Frame, memory: &GuestMemory) -> Message {
        let page = PageRequest {
            action: request.byte(0x00),
            kind: request.byte(0x17),
            number: request.byte(0x16),
            address: request.word(0x18),
        };
        let header = self.pages.header(&page);
        let status = header.and_then(|_| self.move_page(&page, request, memory)).err().unwrap_or(IocStatus::Success);
        let mut reply = Message::to(request, 6, status);
        let asked = [request.byte(0x14), request.byte(0x15), request.byte(0x16), request.byte(0x17)];
        reply.set_byte(0x00, page.action).set_bytes(0x14, &header.unwrap_or(asked));
        reply
    }

    fn move_page(&mut self, page: &PageRequest, request: &Frame, memory: &GuestMemory) -> Result<(), IocStatus> {
        let buffer = simple_element(request, 0x1C);
        match self.pages.access(page)? {
            PageAccess::Header => Ok(()),
            PageAccess::Read(bytes) => {
                let (address, length) = buffer.ok_or(IocStatus::InvalidScatterGather)?;
                let bytes = &bytes[..bytes.len().min(length)];
                memory.write_slice(bytes, address).map_err(|_| IocStatus::InvalidScatterGather)
            }
            PageAccess::Write => {
                let (address, length) = buffer.ok_or(IocStatus::InvalidScatterGather)?;
                let mut bytes = vec![0; length.min(self.pages.largest())];
                memory.read_slice(&mut bytes, address).map_err(|_| IocStatus::InvalidScatterGather)?;
                self.pages.write(page, &bytes)
            }
        }
    }
}

fn port_facts(request: &Frame) -> Message {
    const PORT_IS_SCSI: u8 = 0x01;
    /// Initiator, with logical bus addresses.
    const PROTOCOLS: u16 = 0x09;
    let port = request.byte(0x06);
    let mut reply = Message::to(request, 10, IocStatus::Success);
    reply.set_byte(0x06, port);
    if port == 0 {
        reply.set_byte(0x15, PORT_IS_SCSI).set_half(0x16, TARGETS.into());
        reply.set_half(0x18, OWN_TARGET.into()).set_half(0x1A, PROTOCOLS);
    }
    reply
}

/// EVENT NOTIFICATION's reply, which comes for each event anew; `flags` says so for all but the first.
fn event_message(event: Event, context: u32, flags: u8, data: u32) -> Message {
    const CONTINUATION: u8 = 0x80;
    let mut message = Message::with(8, function::EVENT_NOTIFICATION, flags | CONTINUATION, context, IocStatus::Success);
    message.set_half(0x00, 1).set_word(0x14, event as u32).set_word(0x1C, data);
    message
}

/// The one simple element at `offset` of a request: address and length.
fn simple_element(request: &Frame, offset: usize) -> Option<(GuestAddress, usize)> {
    const SIMPLE: u8 = 0x10;
    const FLAG_64_BIT: u8 = 0x02;
    let head = request.word(offset);
    let flags = (head >> 24) as u8;
    let high = if flags & FLAG_64_BIT != 0 { request.word(offset + 8) } else { 0 };
    let address = u64::from(high) << 32 | u64::from(request.word(offset + 4));
    (flags & 0x30 == SIMPLE).then_some((GuestAddress(address), (head & 0x00FF_FFFF) as usize))
}
