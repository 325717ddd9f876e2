//! How searches that share the engine differ.

/// How urgent a search is, and how much of the engine it takes. More urgent classes come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// With a floor, while somebody waits at a turnstile or a till.
    Urgent,
    /// With a floor, for other purposes.
    Ordinary,
    /// Without a floor, or with one that rules out few rows.
    Floorless,
}

impl Class {
    pub(super) const ALL: [Self; 3] = [Self::Urgent, Self::Ordinary, Self::Floorless];

    /// The priority at which its batches are searched.
    pub(super) fn priority(self) -> Priority {
        match self {
            Self::Urgent | Self::Ordinary => Priority::High,
            Self::Floorless => Priority::Low,
        }
    }

    /// Most probes of a batch while urgent searches arrive, since an engine may be unable to let them go first.
    pub(super) fn probes_beside_urgent(self) -> usize {
        match self {
            Self::Urgent => usize::MAX,
            Self::Ordinary => 32,
            Self::Floorless => crate::model::PROBES_MAX,
        }
    }

    /// How many of the places in the queue this class may have.
    pub(super) fn places(self, queue_max: usize) -> usize {
        match self {
            Self::Urgent => queue_max,
            Self::Ordinary => queue_max.div_ceil(2),
            Self::Floorless => queue_max.div_ceil(4),
        }
    }
}

/// The priority of a batch in the engine. Each has a search thread of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// Searches with a floor.
    High,
    /// The others, which let those go first.
    Low,
}

impl Priority {
    pub(super) const ALL: [Self; 2] = [Self::High, Self::Low];
}
