//! Owns: what initiators ask for by text in the full feature phase: which targets there are, and where.
//! Promises: an answer of any length, in as many pieces as the initiator takes.
//! Must not know: commands.

use iscsi::pdu::{Header, NO_TAG, RejectReason, TextRequest, TextResponse};
use iscsi::text;

use super::{Next, Session};

impl Session {
    /// SendTargets is all that may be asked here (RFC 7143, 6.4 and appendix C).
    pub(super) fn text(&self, header: &Header, request: &TextRequest, data: &[u8]) -> Next {
        let held = self.rest.take();
        let rest = match held {
            Some((tag, rest)) if request.transfer_tag == tag => rest,
            _ if request.transfer_tag != NO_TAG => return self.reject(header, RejectReason::InvalidField),
            _ if request.continues => return self.reject(header, RejectReason::NotSupported),
            _ => {
                let Ok(pairs) = text::parse(data) else { return self.reject(header, RejectReason::InvalidField) };
                let mut answer = Vec::new();
                for (key, value) in pairs {
                    match (key, value, &self.target) {
                        ("SendTargets", "All", None) => {
                            self.server.list(&self.initiator, None, self.entrance, &mut answer)
                        }
                        ("SendTargets", "", Some(target)) => {
                            self.server.list(&self.initiator, Some(&target.name), self.entrance, &mut answer);
                        }
                        ("SendTargets", "All" | "", _) => text::push(&mut answer, key, "Reject"),
                        ("SendTargets", name, _) => {
                            self.server.list(&self.initiator, Some(name), self.entrance, &mut answer)
                        }
                        _ => text::push(&mut answer, key, "NotUnderstood"),
                    }
                }
                answer
            }
        };
        let most = self.agreed.initiator_segment as usize;
        let (now, later) = rest.split_at(rest.len().min(most));
        let transfer_tag = if later.is_empty() { NO_TAG } else { self.transfer_tag() };
        let is_last = later.is_empty();
        let answer = TextResponse { is_final: is_last, continues: !is_last, tag: request.tag, transfer_tag };
        self.outbox.push(answer.encode(self.numbers.with_status()), now);
        if !is_last {
            *self.rest.borrow_mut() = Some((transfer_tag, later.to_vec()));
        }
        Next::GoOn
    }
}
