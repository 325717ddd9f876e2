//! Why the gallery could not follow the registry.

use std::path::PathBuf;

use thenar_index::{Error as IndexError, GalleryId};

use crate::registry::RegistryError;

/// Why the gallery could not follow the registry.
#[derive(Debug, thiserror::Error)]
pub enum GalleryError {
    /// The index failed.
    #[error("the index: {0}")]
    Index(#[source] IndexError),
    /// The registry failed.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The index belongs to another gallery than the registry.
    #[error(
        "the registry is that of gallery {registry}, but the index in {} is that of gallery {index}: one of them is from \
         another data folder. Put the registry back that belongs here. If this registry is the right one, remove the \
         index folder, and the index is rebuilt",
        dir.display()
    )]
    Swapped {
        /// The index's folder.
        dir: PathBuf,
        /// The gallery of the index.
        index: GalleryId,
        /// The gallery of the registry.
        registry: GalleryId,
    },
    /// An index built from the registry's log does not have the templates that the registry counts.
    #[error(
        "the registry contradicts itself: its change log does not lead to the templates it counts. It is damaged; \
         restore it from a backup"
    )]
    Contradiction,
    /// The disk has too little room to bring the index up to the registry.
    #[error("the disk of {} has {free_bytes} bytes left; the index follows once there is room", path.display())]
    DiskFull {
        /// The index's folder.
        path: PathBuf,
        /// Room that is left.
        free_bytes: u64,
    },
    /// A folder could not be used.
    #[error("could not use {}: {source}", path.display())]
    Folder {
        /// Which.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },
}

impl From<IndexError> for GalleryError {
    fn from(error: IndexError) -> Self {
        match error {
            IndexError::WrongGallery { dir, expected, found } => {
                Self::Swapped { dir, index: found, registry: expected }
            }
            error => Self::Index(error),
        }
    }
}
