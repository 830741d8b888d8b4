//! Owns: what all adapters have in common behind their registers: one thread that takes the doorbell, begins requests on a
//! fixed pool of tasks, posts answers in batches, and ends requests before their time.
//! Promises: no request changes threads or allocates here; each is answered exactly once or forgotten by a reset; when a
//! reset, an abort or a stop has replied, the requests that it ends can never touch guest memory again.
//! Must not know: how any adapter lays out its registers, rings and messages, or what stores the blocks.

mod control;
mod engine;
mod request;
mod state;
mod tasks;

use std::collections::VecDeque;
use std::fmt::{Debug, Display};

use scsi::{BlockDevice, NexusId};

pub(crate) use self::engine::Engine;
pub(crate) use self::state::Ending;
pub(crate) use self::tasks::Queue;
use super::guest_segments::GuestSegments;

/// The one initiator of each adapter's bus.
pub(crate) const NEXUS: NexusId = NexusId(0);

/// The adapter's own target number on a parallel bus.
pub(crate) const OWN_TARGET: u8 = 7;

/// How one kind of adapter takes requests from the guest and gives it answers. Lives on the queue's thread.
pub(crate) trait Rings: Sized + 'static {
    /// A request as it was read from guest memory.
    type Descriptor: 'static;
    /// What of a request is needed to choose it and to answer it without carrying it out.
    type Key: Copy + Debug;
    /// What the guest gets.
    type Answer;
    /// Why a request ends without having been carried out.
    type Failure: Copy + Debug;
    /// Why the rings cannot be used any more.
    type Error: Display;

    /// The failure of a request that the adapter has lost by a fault of its own.
    const LOST: Self::Failure;
    /// The failure of a request whose target has been pulled out.
    const TARGET_GONE: Self::Failure;

    /// The key of a request.
    fn key(descriptor: &Self::Descriptor) -> Self::Key;

    /// The target of a request.
    fn target(key: &Self::Key) -> u8;

    /// The answer to a request that ends by `failure`.
    fn failed(key: Self::Key, failure: Self::Failure) -> Self::Answer;

    /// How many requests wait to be taken, at least while there are any.
    fn pending(&mut self) -> Result<u32, Self::Error>;

    /// Takes the next request; `None` if there is none.
    fn fetch(&mut self) -> Result<Option<Self::Descriptor>, Self::Error>;

    /// Gives the guest as many of `answers` as it has room for; returns how many.
    fn post(&mut self, answers: &mut VecDeque<Self::Answer>) -> Result<usize, Self::Error>;
}

/// What has become of a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// It has been plugged in.
    Added,
    /// It has been pulled out.
    Removed,
}

/// One kind of adapter: what its queue does that others' do not. Shared with the threads that access registers.
pub(crate) trait Model: Send + Sync + Sized + 'static {
    /// Its rings.
    type Rings: Rings;
    /// What register accesses ask of the queue's thread.
    type Call: Send + 'static;
    /// What that gives back.
    type Reply: Send + 'static;

    /// Its name in messages.
    const NAME: &'static str;
    /// Target numbers from 0 on, the adapter's own included.
    const TARGETS: u8;

    /// The rings that there are from the start; `None` if the guest brings them.
    fn initial_rings(&self) -> Option<Self::Rings>;

    /// Carries out a request; `None` if it has been handed on to a call, which will answer it.
    fn carry_out<D: BlockDevice + 'static>(
        queue: &Queue<Self, D>,
        descriptor: &<Self::Rings as Rings>::Descriptor,
        segments: &mut GuestSegments,
    ) -> impl Future<Output = Option<<Self::Rings as Rings>::Answer>>;

    /// Carries out a call.
    fn call<D: BlockDevice + 'static>(queue: &Queue<Self, D>, call: Self::Call) -> impl Future<Output = Self::Reply>;

    /// A batch of answers has been posted: the guest is to be interrupted.
    fn posted(&self);

    /// Tells the guest of a change, if it wants to know.
    fn announce<D: BlockDevice + 'static>(queue: &Queue<Self, D>, change: Change, target: u8);
}
