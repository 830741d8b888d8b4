//! Owns: applying edits to a directory as one commit.
//! Promises: the commit goes from exactly the image that the edits were decided on, or not at all.
//! Must not know: why the entries change.

use std::rc::Rc;
use std::time::Duration;

use super::image::Found;
use super::names::{Names, Patience, pause};
use super::tree::{self, Bucket, Changed, Edit, Plan, UnitPlace};
use crate::alloc::units::{PreparedUnit, Purpose, UnitUse};
use crate::error::{FsError, FsErrorKind};
use crate::format::body::{Body, Content};
use crate::format::root_cell::ObjectState;
use crate::format::table_entry::EntryKind;
use crate::format::unit::UnitRef;
use crate::object::{Change, Committed, Image, Object};
use crate::units::FdId;

/// Longest that a host stands back for one that asked to be let in.
const STAND_BACK: Duration = Duration::from_millis(20);

/// What a change of a directory needs, before it is committed.
struct Built {
    content: Content,
    units: Vec<PreparedUnit>,
    dropped: Vec<(UnitPlace, UnitRef)>,
    growth: i64,
    /// New buckets as they will be read back.
    buckets: Vec<(UnitRef, Rc<Bucket>)>,
}

impl Names {
    /// Commits `edits` to a directory from `image`. `Lost` and `Overtaken` leave the object refreshed; an error whose kind is `Io`
    /// leaves it open whether the change is there.
    pub(super) async fn commit_edits(
        &self,
        directory: &Found,
        image: &Rc<Image>,
        edits: &[Edit],
        patience: &Patience,
    ) -> Result<Committed, FsError> {
        if image.root.lock.wanted && !patience.wants() {
            // Another host asked to be let in. Whoever commits next takes the request back: a host that died asking costs one pause.
            pause(self.context.env(), STAND_BACK).await;
        }
        let built = match self.build(directory, image, edits).await {
            Ok(built) => built,
            Err(error) => {
                self.changed_since(directory, image, error).await?;
                return Ok(Committed::Lost);
            }
        };
        let mut attributes = image.body.attributes.clone();
        let now = self.context.env().wall_ns();
        attributes.size = attributes.size.saturating_add_signed(built.growth);
        attributes.modified_ns = now;
        attributes.changed_ns = now;
        let wants = patience.wants();
        let committed = self
            .objects
            .commit(
                directory,
                image,
                Change {
                    body: Some(Body { attributes, content: built.content }),
                    units: built.units,
                    drop_units: built.dropped.iter().map(|dropped| dropped_unit(directory.fd, dropped)).collect(),
                    root: Some(Box::new(|root| root.lock.wanted = false)),
                    freeing: edits.iter().all(|edit| matches!(edit, Edit::Remove(_))),
                    ..Change::default()
                },
            )
            .await?;
        match committed {
            Committed::Done => {
                let mut cache = self.cache.borrow_mut();
                for (reference, bucket) in built.buckets {
                    cache.put_bucket(directory.fd, reference, bucket);
                }
            }
            Committed::Lost | Committed::Overtaken => {
                if wants {
                    self.ask_to_be_let_in(directory).await?;
                }
            }
        }
        Ok(committed)
    }

    /// Commits edits that set what is there already: the units that hold it are written again, the attributes stay.
    pub(super) async fn commit_same(
        &self,
        directory: &Found,
        image: &Rc<Image>,
        edits: &[Edit],
    ) -> Result<Committed, FsError> {
        let built = match self.build(directory, image, edits).await {
            Ok(built) => built,
            Err(error) => {
                self.changed_since(directory, image, error).await?;
                return Ok(Committed::Lost);
            }
        };
        let change = Change {
            body: Some(Body { attributes: image.body.attributes.clone(), content: built.content }),
            units: built.units,
            drop_units: built.dropped.iter().map(|dropped| dropped_unit(directory.fd, dropped)).collect(),
            ..Change::default()
        };
        let committed = self.objects.commit(directory, image, change).await?;
        if matches!(committed, Committed::Done) {
            let mut cache = self.cache.borrow_mut();
            for (reference, bucket) in built.buckets {
                cache.put_bucket(directory.fd, reference, bucket);
            }
        }
        Ok(committed)
    }

    /// Sets `wanted` in the root cell. Losing that too is no matter: it is tried again after the next loss.
    async fn ask_to_be_let_in(&self, directory: &Found) -> Result<(), FsError> {
        let image = directory.image()?;
        if image.root.lock.wanted {
            return Ok(());
        }
        self.change_root(directory, &image, |root| root.lock.wanted = true).await.map(|_| ())
    }

    /// Computes the new tree and prepares its units.
    async fn build(&self, directory: &Found, image: &Image, edits: &[Edit]) -> Result<Built, FsError> {
        let source = self.units_of(directory.fd, image);
        let mut plan: Plan = match tree::change(&source, self.context.cell_size(), &image.body.content, edits).await? {
            Changed::Small { content, dropped, growth } => {
                return Ok(Built { content, units: Vec::new(), dropped, growth, buckets: Vec::new() });
            }
            Changed::Large(plan) => plan,
        };
        let freeing = edits.iter().all(|edit| matches!(edit, Edit::Remove(_)));
        let purpose = if freeing { Purpose::Freeing } else { Purpose::Normal };
        let mut units = Vec::new();
        let (streams, cached) = (plan.buckets(), plan.cached_buckets());
        let references = self.prepare_all(directory, EntryKind::Bucket, streams, purpose, &mut units).await?;
        let buckets = references.iter().copied().zip(cached).collect();
        let streams = plan.inners(&references);
        let inners = self.prepare_all(directory, EntryKind::Inner, streams, purpose, &mut units).await?;
        let (content, dropped, growth) = plan.content(&inners);
        Ok(Built { content, units, dropped, growth, buckets })
    }

    /// Prepares a unit for each stream; what was prepared so far goes back to the pool when one cannot be had.
    async fn prepare_all(
        &self,
        directory: &Object,
        kind: EntryKind,
        streams: Vec<(u32, Vec<u8>)>,
        purpose: Purpose,
        units: &mut Vec<PreparedUnit>,
    ) -> Result<Vec<UnitRef>, FsError> {
        let mut references = Vec::with_capacity(streams.len());
        for (index, stream) in streams {
            match self.objects.prepare(directory, kind, index, &stream, purpose).await {
                Ok(unit) => {
                    references.push(unit.reference);
                    units.push(unit);
                }
                Err(error) => {
                    self.objects.discard(std::mem::take(units)).await;
                    return Err(error);
                }
            }
        }
        Ok(references)
    }
}

fn dropped_unit(owner: FdId, (place, reference): &(UnitPlace, UnitRef)) -> UnitUse {
    let (kind, index) = match place {
        UnitPlace::Bucket(index) => (EntryKind::Bucket, *index),
        UnitPlace::Inner(index) => (EntryKind::Inner, *index),
    };
    UnitUse { at: reference.at, owner, kind, index }
}

/// Whether an image may be changed by adding or removing names. `Busy`: a host is about to remove the directory, or died over it, which its
/// recovery decides; `NotFound`: it has lost its name.
pub(super) fn expect_live(image: &Image) -> Result<(), FsError> {
    match image.root.state {
        ObjectState::Live | ObjectState::Creating(_) => Ok(()),
        ObjectState::Unlinking(_) => {
            Err(FsError::refused(FsErrorKind::Busy, "a host is about to remove the directory; try again"))
        }
        _ => Err(FsError::refused(FsErrorKind::NotFound, "the directory has been removed")),
    }
}
