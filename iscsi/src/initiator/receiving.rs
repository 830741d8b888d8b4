//! Owns: what is done with what the target sends.
//! Promises: data go into the memory of the command that they are for, or nowhere; whatever does not belong here ends the connection.
//! Must not know: how commands are sent, how connections come about.

use std::time::{Duration, Instant};

use super::error::Broken;
use super::inbox::{Came, Inbox};
use super::outgoing::TICK;
use super::session::{Link, Ping, Shared};
use super::tasks::{LOGOUT, PING};
use crate::pdu::{Answer, Header, NO_TAG, Sequence};

/// How long a target can have us stay away.
const LONGEST_STAY: Duration = Duration::from_secs(10);

/// What was heard.
enum Heard {
    /// Nothing within the tick.
    Quiet,
    /// A part of a PDU.
    Part,
    /// A PDU: the task that it changes, if any, whether it may have ended others along, and whether the target takes more commands now.
    Whole { slot: Option<usize>, ends_others: bool, grows: bool },
}

/// Where the data of the PDU under way go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Route {
    /// They are small, and kept with the inbox.
    #[default]
    Small,
    /// Into the memory of this slot's caller from this offset on, if it is still lent under this tag.
    Landing { slot: usize, tag: u32, offset: usize },
}

impl Shared {
    /// Receives for all until something is there for the task of `slot`, or its time is over; puts the receiving half back.
    pub fn receive(&self, mut inbox: Box<Inbox>, slot: usize, deadline: Instant) {
        let mut is_mine = false;
        let result = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() && !inbox.has_more() {
                break Ok(());
            }
            if let Err(error) = inbox.set_tick(left.min(TICK)) {
                break Err(error.into());
            }
            match self.hear(&mut inbox) {
                Ok(Heard::Whole { slot: whose, ends_others, grows }) => {
                    is_mine |= whose == Some(slot) || grows && self.is_queued(slot) || ends_others && self.is_over(slot)
                }
                Ok(Heard::Part | Heard::Quiet) => {}
                Err(broken) => break Err(broken),
            }
            if is_mine && !inbox.has_more() {
                break Ok(());
            }
        };
        self.put_back(inbox, result);
    }

    /// Takes what is there already, while nobody waits for anything.
    pub fn receive_idle(&self, mut inbox: Box<Inbox>) {
        let deadline = Instant::now() + TICK;
        let result = loop {
            if let Err(error) = inbox.set_tick(Duration::from_millis(1)) {
                break Err(error.into());
            }
            match self.hear(&mut inbox) {
                Ok(Heard::Quiet) => break Ok(()),
                Ok(_) if Instant::now() >= deadline => break Ok(()),
                Ok(_) => {}
                Err(broken) => break Err(broken),
            }
        };
        self.put_back(inbox, result);
        self.pass_on();
    }

    /// Takes what is there already, without waiting.
    pub fn receive_now(&self, mut inbox: Box<Inbox>) {
        (inbox.at_once, inbox.is_drained) = (true, false);
        let result = loop {
            match self.hear(&mut inbox) {
                Ok(Heard::Quiet) => break Ok(()),
                Ok(_) if inbox.is_drained && !inbox.has_more() => break Ok(()),
                Ok(_) => {}
                Err(broken) => break Err(broken),
            }
        };
        inbox.at_once = false;
        self.put_back(inbox, result);
    }

    fn put_back(&self, inbox: Box<Inbox>, result: Result<(), Broken>) {
        if let Err(broken) = result {
            return self.fail(inbox.epoch, &broken);
        }
        let mut core = self.core.lock();
        if core.epoch == inbox.epoch && matches!(core.link, Link::Up(_)) {
            core.inbox = Some(inbox);
        }
    }

    fn is_over(&self, slot: usize) -> bool {
        self.core.lock().tasks.is_over(slot)
    }

    fn is_queued(&self, slot: usize) -> bool {
        self.core.lock().queued & 1 << slot != 0
    }

    /// Receives at most once, and deals with at most one PDU.
    fn hear(&self, inbox: &mut Inbox) -> Result<Heard, Broken> {
        let part = |came: Came| if came == Came::Quiet { Heard::Quiet } else { Heard::Part };
        if inbox.payload.is_none() {
            match inbox.next_header()? {
                Some(header) => inbox.route = self.route(&header)?,
                None => return Ok(part(inbox.receive(&mut [])?)),
            }
        }
        while let Some(payload) = &inbox.payload
            && payload.remaining > 0
        {
            if inbox.staged() == 0 {
                return Ok(part(self.receive_data(inbox)?));
            }
            self.unstage(inbox);
        }
        let Some(header) = inbox.finish()? else { return Ok(part(inbox.receive(&mut [])?)) };
        self.take(&header, inbox)
    }

    /// Receives data straight to where they belong.
    fn receive_data(&self, inbox: &mut Inbox) -> Result<Came, Broken> {
        let Route::Landing { slot, tag, offset } = inbox.route else { return inbox.receive(&mut []) };
        let remaining = inbox.payload.as_ref().map_or(0, |payload| payload.remaining);
        let came = self.landings[slot].with(tag, offset, |memory| {
            let length = memory.len().min(remaining);
            let came = inbox.receive(&mut memory[..length])?;
            if let Came::Bytes(count) = came {
                inbox.account(&memory[..count]);
            }
            Ok(came)
        });
        match came {
            Some(Ok(Came::Bytes(count))) => {
                inbox.route = Route::Landing { slot, tag, offset: offset + count };
                Ok(Came::Bytes(count))
            }
            Some(other) => other,
            None => inbox.receive(&mut []),
        }
    }

    fn unstage(&self, inbox: &mut Inbox) {
        let Route::Landing { slot, tag, offset } = inbox.route else {
            inbox.keep_staged();
            return;
        };
        let moved = self.landings[slot].with(tag, offset, |memory| inbox.unstage(memory));
        match moved {
            Some(count) if count > 0 => inbox.route = Route::Landing { slot, tag, offset: offset + count },
            // Its caller is gone: the rest is forgotten.
            _ => {
                inbox.keep_staged();
            }
        }
    }

    fn route(&self, header: &Header) -> Result<Route, Broken> {
        let Answer::Data(data) = Answer::decode(header)? else { return Ok(Route::Small) };
        let slot = self.core.lock().tasks.take_data(&data, header.data_length() as u32)?;
        Ok(Route::Landing { slot, tag: data.tag, offset: data.offset as usize })
    }

    /// Deals with a PDU whose data are where they belong.
    fn take(&self, header: &Header, inbox: &Inbox) -> Result<Heard, Broken> {
        let (answer, sequence) = (Answer::decode(header)?, Sequence::decode(header));
        let mut core = self.core.lock();
        if core.epoch != inbox.epoch || !matches!(core.link, Link::Up(_)) {
            return Err(Broken::Closed);
        }
        core.heard = Instant::now();
        core.pinged = None;
        let grows = core.tasks.take_window(sequence);
        if grows {
            let queued = core.queued;
            core.rouse_all(queued);
        }
        let has_status = match &answer {
            Answer::Data(data) => data.status.is_some(),
            Answer::Nop(nop) => nop.tag != NO_TAG,
            Answer::Ready(_) => false,
            _ => true,
        };
        if has_status {
            core.tasks.take_status(sequence.status)?;
        }
        let slot = match &answer {
            Answer::Data(data) => match inbox.route {
                Route::Landing { slot, .. } => {
                    core.tasks.end_data(slot, data, header.data_length() as u32);
                    has_status.then_some(slot)
                }
                Route::Small => None,
            },
            Answer::Response(response) => Some(core.tasks.take_response(response, &inbox.small)?),
            Answer::Ready(ready) => Some(core.tasks.take_ready(ready)?),
            Answer::Task(task) => {
                let slot = core.tasks.take_managed(task.tag, task.response)?;
                // It may have ended others along.
                core.rouse_all(!(1 << slot));
                Some(slot)
            }
            Answer::Nop(nop) => {
                if nop.tag != NO_TAG && nop.tag != PING {
                    return Err(Broken::Protocol("the answer to a ping that nobody sent"));
                }
                if nop.transfer_tag != NO_TAG {
                    core.take_ping(Ping { lun: nop.lun, transfer_tag: nop.transfer_tag })?;
                    self.changed.notify_all();
                }
                None
            }
            Answer::Async { event, parameters } => {
                tracing::info!(path = %self.name, event, ?parameters, "the target sends an asynchronous message");
                let seconds = |nth: usize| Duration::from_secs(parameters[nth].into());
                match event {
                    // A logout is asked for, or a new agreement, for which we log in anew (11.9.1).
                    1 | 4 => core.leave_by = Some(Instant::now() + seconds(2).min(LONGEST_STAY)),
                    // It will drop the connection, or all of them.
                    2 | 3 => core.stay_away = seconds(1).min(LONGEST_STAY),
                    _ => {}
                }
                self.changed.notify_all();
                None
            }
            Answer::Reject(reason) => core.tasks.take_reject(*reason, &inbox.small)?,
            Answer::Logout(logout) if logout.tag == LOGOUT => {
                core.logged_out = Some(logout.response);
                self.changed.notify_all();
                if logout.response == 0 {
                    return Err(Broken::LoggedOut);
                }
                None
            }
            Answer::Logout(_) => return Err(Broken::Protocol("the answer to a logout that nobody sent")),
            Answer::Login(_) | Answer::Text(_) => return Err(Broken::Protocol("the answer to what nobody asked")),
        };
        let sleeper = slot.and_then(|slot| core.rouse(slot));
        drop(core);
        if let Some(caller) = sleeper {
            caller.wake();
        }
        Ok(Heard::Whole { slot, ends_others: matches!(answer, Answer::Task(_)), grows })
    }
}
