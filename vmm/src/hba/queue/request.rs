//! Owns: one request that somebody works on.
//! Promises: a request is answered exactly once; dropping one answers with an error.
//! Must not know: what a request asks for.

use std::cell::RefCell;

use super::Rings;
use super::state::State;

/// See the module.
pub(super) struct Request<'a, R: Rings> {
    state: &'a RefCell<State<R>>,
    slot: usize,
    pub(super) descriptor: R::Descriptor,
    answered: bool,
}

impl<'a, R: Rings> Request<'a, R> {
    /// A request that now occupies `slot`.
    pub(super) fn new(state: &'a RefCell<State<R>>, slot: usize, descriptor: R::Descriptor) -> Self {
        Self { state, slot, descriptor, answered: false }
    }

    /// Answers it (`None`: it has been handed on). The guest's memory is not touched for it any more.
    pub(super) fn answer(mut self, answer: Option<R::Answer>) {
        self.answered = true;
        self.state.borrow_mut().finish(self.slot, answer);
    }
}

impl<R: Rings> Drop for Request<'_, R> {
    fn drop(&mut self) {
        if !self.answered {
            let answer = R::failed(R::key(&self.descriptor), R::LOST);
            self.state.borrow_mut().finish(self.slot, Some(answer));
        }
    }
}
