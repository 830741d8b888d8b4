//! Owns: the space of a volume: block table, units, root cells, and where unfinished work may lie.
//! Promises: what is given out belongs to one owner, also when hosts race; what cannot be settled is never given out again.
//! Must not know: names, file data.

pub mod arena;
pub mod blocks;
mod free_space;
pub mod owners;
pub mod roots;
pub mod table;
pub(crate) mod taking_out;
mod unit_entries;
mod unit_stream;
pub mod units;

pub use free_space::BlockCount;

/// The first error of several changes that have all ended.
///
/// A change that was sent is always heard out: one that is dropped half way could land unnoticed.
pub(crate) fn all_done<T>(results: Vec<Result<T, crate::error::FsError>>) -> Result<Vec<T>, crate::error::FsError> {
    results.into_iter().collect()
}

use std::rc::Rc;

use crate::context::Context;

/// Everything that gives space out.
pub struct Space {
    /// Blocks.
    pub blocks: blocks::Blocks,
    /// Units.
    pub units: units::Units,
    /// Root cells.
    pub roots: roots::Roots,
    /// The table cells behind blocks and units.
    pub tables: Rc<table::Tables>,
}

impl Space {
    /// For a mounted volume.
    pub fn new(context: &Rc<Context>) -> Rc<Space> {
        let arenas = Rc::new(arena::Arenas::new(context.clone()));
        let tables = Rc::new(table::Tables::new(context.clone(), arenas.clone()));
        let blocks = blocks::Blocks::new(context.clone(), tables.clone());
        let units = units::Units::new(context.clone(), tables.clone(), blocks.containers().clone());
        let roots = roots::Roots::new(context.clone(), arenas, blocks.containers().clone());
        Rc::new(Space { blocks, units, roots, tables })
    }
}
