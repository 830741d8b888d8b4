//! Owns: the carrying out of commands whose data are there, and the sending of what they have read.
//! Promises: in the steady state nothing is allocated: workers are kept, memory is lent; a worker that is the last one sends at once.
//! Must not know: how data of writes are collected.

use std::cell::RefCell;
use std::rc::Rc;

use scsi::{Command, Completion, DataBuffer, Lun, ShortBuffer, Task, TaskAttribute};
use tokio::sync::Notify;

use super::Session;
use crate::memory::{LONGEST_TRANSFER, Memory};
use iscsi::pdu::{DataIn, Residual, ScsiCommand, ScsiResponse};

/// A command whose data are there, if it has some for the target.
pub(super) struct Job {
    pub(super) command: ScsiCommand,
    pub(super) task: Task,
    /// The data of a write.
    pub(super) memory: Option<Memory>,
    /// R2Ts that it took.
    pub(super) wishes: u32,
}

/// Carries out one command after the other.
#[derive(Default)]
pub(super) struct Worker {
    job: RefCell<Option<Job>>,
    pub(super) called: Notify,
}

impl Session {
    pub(super) fn start(self: &Rc<Self>, job: Job) {
        self.running.borrow_mut().insert(job.command.tag);
        /// What a command costs beside its bytes, in bytes.
        const PAGE: u32 = 4096;
        self.begun.set(self.begun.get().saturating_add(PAGE).saturating_add(job.command.expected));
        let idle = self.idle.borrow_mut().pop();
        let worker = idle.unwrap_or_else(|| {
            let worker = Rc::new(Worker::default());
            tokio_uring::spawn(self.clone().work(worker.clone()));
            worker
        });
        worker.job.replace(Some(job));
        worker.called.notify_one();
    }

    /// Carries out what `worker` is given until the session is over.
    async fn work(self: Rc<Self>, worker: Rc<Worker>) {
        while !self.is_gone.get() {
            let Some(job) = worker.job.take() else {
                worker.called.notified().await;
                continue;
            };
            let tag = job.command.tag;
            self.carry_out(job).await;
            let is_last = {
                let mut running = self.running.borrow_mut();
                running.remove(&tag);
                running.is_empty()
            };
            self.numbers.end();
            self.over.notify_one();
            self.idle.borrow_mut().push(worker.clone());
            // Nobody else has an answer that could go along, or there is enough without it.
            if is_last || self.outbox.is_worth_a_call() {
                self.outbox.flush();
            }
        }
    }

    /// Memory for what a command reads; none: there is none now, and it must not wait, since others wait for it.
    async fn room_for(&self, command: &ScsiCommand) -> Option<Memory> {
        /// Head of queue.
        const HEAD: u8 = 3;
        let length = (command.expected as usize).min(LONGEST_TRANSFER);
        match self.share.try_take(length) {
            None if command.attribute == HEAD => None,
            None => Some(self.share.take(length).await),
            some => some,
        }
    }

    async fn carry_out(&self, job: Job) {
        let Job { command, task, memory: out, wishes } = job;
        let Some(target) = &self.target else { return };
        let room = match command.reads && command.expected > 0 {
            false => None,
            true => match self.room_for(&command).await {
                None => return self.refuse(&command),
                some => some,
            },
        };
        let done = {
            let length = (command.expected as usize).min(LONGEST_TRANSFER);
            let buffer =
                |memory: &Option<Memory>| memory.as_ref().map_or_else(DataBuffer::empty, |it| it.first(length));
            let (data_out, data_in) = (buffer(&out), buffer(&room));
            target
                .units
                .run(
                    &task,
                    &Command {
                        nexus: self.nexus,
                        lun: Lun::from_sam(command.lun),
                        tag: command.tag.into(),
                        attribute: TaskAttribute::Simple,
                        short_buffer: ShortBuffer::Truncate,
                        cdb: &command.cdb[..cdb_length(command.cdb[0])],
                        data_out: &data_out,
                        data_in: &data_in,
                    },
                )
                .await
        };
        drop(out);
        if done.aborted {
            return;
        }
        let count = if command.writes { &self.bytes_written } else { &self.bytes_read };
        count.set(count.get() + done.transferred);
        let residual = Residual::of(command.expected, done.transferred, done.overflow);
        let mut sent = wishes;
        if let Some(room) = room
            && done.transferred > 0
        {
            sent = self.send_data(command.tag, &room, &done, residual, &task).await;
            if done.sense.is_none() || task.is_aborted() {
                return;
            }
        }
        let sense = done.sense.as_ref().map_or(&[][..], |sense| sense.as_bytes());
        let status = done.status as u8;
        self.respond(ScsiResponse { tag: command.tag, response: 0, status, data_count: sent, residual }, sense);
    }

    /// Sends what a command has read, and with the last piece its status if there is no sense. Returns the number of PDUs.
    async fn send_data(&self, tag: u32, room: &Memory, done: &Completion, residual: Residual, task: &Task) -> u32 {
        let total = done.transferred as u32;
        let (segment, burst) = (self.agreed.initiator_segment, self.agreed.burst);
        let (mut offset, mut number, mut burst_end) = (0, 0, burst.min(total));
        while offset < total {
            self.outbox.room().await;
            if task.is_aborted() {
                return number;
            }
            let length = segment.min(burst_end - offset);
            let is_last = offset + length == total;
            let status = (is_last && done.sense.is_none()).then_some((done.status as u8, residual));
            let is_final = offset + length == burst_end;
            let sequence = if status.is_some() { self.numbers.with_status() } else { self.numbers.without_status() };
            let header = DataIn { is_final, tag, number, offset, status }.encode(sequence);
            self.outbox.push_data(header, room, offset as usize, length as usize);
            offset += length;
            number += 1;
            if is_final {
                burst_end = burst_end.saturating_add(burst).min(total);
            }
        }
        number
    }
}

/// Length of a CDB by its group code (SPC-4, 4.2.5.1); of groups without a fixed one: all that there is.
fn cdb_length(opcode: u8) -> usize {
    match opcode >> 5 {
        0 => 6,
        1 | 2 => 10,
        5 => 12,
        _ => 16,
    }
}
