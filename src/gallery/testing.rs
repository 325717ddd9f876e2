//! Set-up that tests over a registry and an index share.

use std::path::Path;
use std::sync::Arc;

use thenar_index::storage::Storage;
use thenar_index::{KeyId, Origin};

use super::{GalleryError, Setup, claim};
use crate::model::{Hand, RequestId, SubjectId, TemplateRow};
use crate::registry::sqlite::SqliteRegistry;
use crate::registry::{Action, Change, GalleryIdentity, Registry, SealedTemplate, Source};
use crate::vault::{MasterKey, Sealer, Vault};

/// The vault of every test, always with the same key.
pub(crate) fn vault() -> Vault {
    Vault::new(MasterKey::from_bytes([5; 32]))
}

/// The registry in `folder`.
pub(crate) fn registry(folder: &Path) -> SqliteRegistry {
    SqliteRegistry::open(&folder.join("registry.sqlite"), vault().registry_keys()).unwrap()
}

/// What a gallery of `registry` with its index in `folder` is opened with. Claims the identity.
pub(crate) fn setup(
    folder: &Path,
    dim: usize,
    storage: Arc<dyn Storage>,
    registry: Arc<dyn Registry>,
) -> Result<Setup, GalleryError> {
    let (vault, dir) = (vault(), folder.join("index"));
    let identity = GalleryIdentity { dim, key_id: vault.key_id() };
    let gallery = claim(&*registry, &storage, &dir, &identity)?;
    let origin = Origin { gallery, key: KeyId(vault.key_id()) };
    Ok(Setup { dir, storage, dim, origin, registry, sealer: Arc::new(vault.sealer(dim)) })
}

/// The subject of that name.
pub(crate) fn subject(name: &str) -> SubjectId {
    SubjectId::new(name).unwrap()
}

/// Enrols a person with one left palm.
pub(crate) fn enrol(sealer: &Sealer, name: &str, row: &TemplateRow) -> Action {
    let templates = vec![SealedTemplate { hand: Hand::Left, sealed: sealer.seal(name, Hand::Left, row) }];
    Action::Enrol { subject: subject(name), source: Source::Person, templates }
}

/// Deletes a person.
pub(crate) fn forget(name: &str) -> Action {
    Action::Forget { subject: subject(name) }
}

/// A change under that request id.
pub(crate) fn change(request_id: &str, action: Action) -> Change {
    Change { request_id: RequestId::new(request_id).unwrap(), digest: [0; 16], action }
}
