//! Hostile messages: seeded mutations of the corpus in `tests/corpus/proto`, decoded and converted as the
//! server does it.

mod conversion;
mod corpus;
mod mutator;

pub(super) use mutator::Mutator;
