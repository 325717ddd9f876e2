//! Compiled kernels are kept for the next start, and a bad file only costs time.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use super::*;

#[test]
fn kernels_are_kept_in_a_file_of_ones_own_and_a_damaged_or_foreign_one_is_written_anew() {
    let folder = tempfile::tempdir().unwrap();
    let dim = 32;
    let values = unit_vectors(200, dim, &mut rng(1));
    let gallery = Gallery::new(dim, &to_rows(&values), &[200]);
    let asked = Asked::alike(values[..dim].to_vec(), dim, 0.5, 0, 200);
    let files = || -> Vec<PathBuf> { std::fs::read_dir(folder.path()).unwrap().map(|f| f.unwrap().path()).collect() };
    let start = |what: &str| {
        let engine = engine_with(DeviceOptions { cache: Some(folder.path().to_owned()), ..DeviceOptions::default() })?;
        engine.follow(&gallery.view()).unwrap();
        hold(&engine, &gallery, &asked, what);
        let files = files();
        assert!(files.len() <= 1, "{what}: {files:?}");
        Some(files.first().cloned())
    };
    let Some(file) = start("first") else { return };
    let Some(file) = file else {
        println!("skipped: this adapter keeps compiled kernels itself");
        return;
    };
    let mode = || std::fs::metadata(&file).unwrap().permissions().mode() & 0o777;
    let kept = std::fs::read(&file).unwrap();
    assert!(mode() == 0o600 && !kept.is_empty(), "{:o}, {} bytes", mode(), kept.len());
    start("second");
    assert_eq!(std::fs::read(&file).unwrap(), kept, "nothing new was compiled");

    for (what, bytes) in [
        ("empty", Vec::new()),
        ("cut short", kept[..kept.len() / 2].to_vec()),
        ("not even a header", b"kernels".to_vec()),
        ("damaged", kept.iter().enumerate().map(|(i, byte)| byte ^ u8::from(i == kept.len() / 2)).collect()),
    ] {
        std::fs::write(&file, &bytes).unwrap();
        start(what);
        assert_ne!(std::fs::read(&file).unwrap(), bytes, "{what}: it was not written anew");
        assert_eq!(mode(), 0o600);
    }

    // Others who may write it could have put anything there.
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o666)).unwrap();
    start("open to all");
    assert_eq!(mode(), 0o600);
}
