pub mod name_set;
pub mod tree;
