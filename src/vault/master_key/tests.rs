//! Every way a key can be wrong, and what is said about it.

use std::collections::HashMap;
use std::os::unix::fs::{PermissionsExt as _, symlink};

use super::*;

const DIGITS: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

fn known() -> MasterKey {
    MasterKey::from_bytes(std::array::from_fn(|i| i as u8))
}

fn parse_error(text: &str) -> String {
    MasterKey::parse(text.as_bytes(), "key.txt").unwrap_err().to_string()
}

#[test]
fn a_written_key_is_read_back_and_only_its_owner_can() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("master.key");
    let key = MasterKey::generate().unwrap();
    key.write_new(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
    assert_eq!(MasterKey::load(&KeySource::File(path)).unwrap().bytes(), key.bytes());
}

#[test]
fn generated_keys_differ() {
    assert_ne!(MasterKey::generate().unwrap().bytes(), MasterKey::generate().unwrap().bytes());
}

#[test]
fn the_text_of_a_key_is_pinned() {
    // The checksum by `(printf thenar-master-key-1:; cat key.bin) | sha256sum`.
    let text = known().to_text();
    assert_eq!(&*text, &format!("thenar-master-key-1:{DIGITS}-7b4c584b\n"));
    let upper = text.trim().to_uppercase().replace("THENAR-MASTER-KEY", "thenar-master-key");
    assert_eq!(MasterKey::parse(upper.as_bytes(), "").unwrap().bytes(), known().bytes());
}

#[test]
fn a_key_is_never_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("master.key");
    known().write_new(&path).unwrap();
    let error = MasterKey::generate().unwrap().write_new(&path).unwrap_err().to_string();
    assert_eq!(
        error,
        format!("{} exists and is not overwritten: a lost master key cannot be made again", path.display())
    );
    assert_eq!(MasterKey::load(&KeySource::File(path)).unwrap().bytes(), known().bytes());
}

#[test]
fn a_key_in_no_folder_is_an_error_of_the_system() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("none/master.key");
    let error = known().write_new(&path).unwrap_err();
    assert!(matches!(&error, KeyError::File { doing: "creating it", .. }), "{error}");
}

#[test]
fn a_missing_key_says_how_to_make_one() {
    let path = tempfile::tempdir().unwrap().path().join("master.key");
    let error = MasterKey::load(&KeySource::File(path.clone())).unwrap_err().to_string();
    assert_eq!(error, format!("there is no master key at {}: make one with `thenar keys generate`", path.display()));
}

#[test]
fn a_key_that_others_can_reach_is_refused_with_its_mode() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("master.key");
    known().write_new(&path).unwrap();
    for mode in [0o640, 0o604, 0o644, 0o620, 0o601, 0o777] {
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        let error = MasterKey::load(&KeySource::File(path.clone())).unwrap_err().to_string();
        let place = path.display();
        assert_eq!(
            error,
            format!(
                "the master key at {place} has mode {mode:04o}, which lets other users read or change it: chmod 600 {place}"
            )
        );
    }
    for mode in [0o600, 0o400] {
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        assert!(MasterKey::load(&KeySource::File(path.clone())).is_ok());
    }
}

#[test]
fn a_key_of_another_user_is_refused() {
    for (owner, user, may) in [(1000, 1000, true), (0, 0, true), (0, 1000, true), (1000, 0, false), (1000, 1001, false)]
    {
        assert_eq!(may_own(owner, user), may, "{owner} {user}");
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("master.key");
    known().write_new(&path).unwrap();
    // Only root can give a file away.
    if std::os::unix::fs::chown(&path, Some(12_345), None).is_ok() {
        let error = MasterKey::load(&KeySource::File(path.clone())).unwrap_err().to_string();
        assert!(error.contains("belongs to user 12345") && error.contains(path.to_str().unwrap()), "{error}");
    }
}

#[test]
fn the_mode_behind_a_link_counts() {
    let folder = tempfile::tempdir().unwrap();
    let (path, link) = (folder.path().join("master.key"), folder.path().join("link"));
    known().write_new(&path).unwrap();
    symlink(&path, &link).unwrap();
    assert!(MasterKey::load(&KeySource::File(link.clone())).is_ok());
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    assert!(matches!(MasterKey::load(&KeySource::File(link)), Err(KeyError::Exposed { mode: 0o644, .. })));
}

#[test]
fn what_is_not_a_file_is_not_a_key() {
    let folder = tempfile::tempdir().unwrap();
    let error = MasterKey::load(&KeySource::File(folder.path().to_owned())).unwrap_err().to_string();
    assert_eq!(error, format!("the master key at {} is not a file", folder.path().display()));
    // A pipe that nobody writes to must not hang the start.
    let pipe = folder.path().join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::from_raw_mode(0o600), 0)
        .unwrap();
    assert!(matches!(MasterKey::load(&KeySource::File(pipe)), Err(KeyError::NotAFile { .. })));
}

#[test]
fn malformed_keys_say_what_is_wrong() {
    let check = known().to_text()[PREFIX.len() + KEY_DIGITS + 1..].trim().to_owned();
    let malformed = |why: &str| format!("the master key in key.txt is malformed: {why}");
    assert_eq!(parse_error(""), malformed("it is empty"));
    assert_eq!(parse_error(" \n\n"), malformed("it is empty"));
    assert_eq!(parse_error(DIGITS), malformed("it does not begin with thenar-master-key-1:"));
    assert_eq!(
        parse_error(&format!("thenar-master-key-2:{DIGITS}-{check}")),
        malformed("it does not begin with thenar-master-key-1:")
    );
    assert_eq!(
        parse_error(&format!("{PREFIX}{}g-{check}", &DIGITS[1..])),
        malformed("its key is not in hexadecimal digits")
    );
    assert_eq!(
        parse_error(&format!("{PREFIX}{DIGITS}\n{PREFIX}{DIGITS}")),
        malformed("its key is not in hexadecimal digits")
    );
    let no_checksum = "its checksum is missing: the line ends with - and 8 hexadecimal digits";
    assert_eq!(parse_error(&format!("{PREFIX}{DIGITS}")), malformed(no_checksum));
    for wrong in ["", "1234567", "123456789", "1234567x", "-1234567"] {
        assert_eq!(
            parse_error(&format!("{PREFIX}{DIGITS}-{wrong}")),
            malformed("its checksum is not 8 hexadecimal digits")
        );
    }
    assert_eq!(parse_error(&"x".repeat(READ_MAX + 1)), malformed("it is longer than a key can be"));
}

#[test]
fn a_cut_or_grown_key_tells_its_length() {
    for digits in [0, 1, 62, 63, 65, 128] {
        let text = format!("{PREFIX}{}-00000000", "ab".repeat(64)[..digits].to_owned());
        assert_eq!(
            parse_error(&text),
            format!("the master key in key.txt has {digits} hexadecimal digits, it must have 64")
        );
    }
}

#[test]
fn every_single_typing_error_is_caught() {
    let text = known().to_text().trim().to_owned();
    for at in PREFIX.len()..text.len() {
        let mut wrong = text.clone().into_bytes();
        wrong[at] = if wrong[at] == b'7' { b'8' } else { b'7' };
        assert!(MasterKey::parse(&wrong, "").is_err(), "digit {at}");
    }
    let mistyped = text.replacen("0102", "0201", 1);
    assert_eq!(parse_error(&mistyped), "the master key in key.txt does not match its checksum: a digit is mistyped");
}

#[test]
fn no_error_and_no_debug_output_holds_a_digit_of_the_key() {
    let text = known().to_text().trim().to_owned();
    let wrong =
        [text.replacen("0102", "0201", 1), text[..60].to_owned(), text[20..].to_owned(), text.replace('f', "z")];
    for text in wrong {
        let error = MasterKey::parse(text.as_bytes(), "key.txt").unwrap_err();
        let shown = format!("{error} {error:?}");
        assert!(!shown.contains("0405060708"), "{shown}");
    }
    assert_eq!(format!("{:?}", known()), "MasterKey(..)");
}

#[test]
fn the_environment_is_a_source() {
    let text = OsString::from(known().to_text().as_str());
    let variables = HashMap::from([(MASTER_KEY_VARIABLE, text)]);
    let load = |variables: &HashMap<&str, OsString>| {
        MasterKey::load_in(&KeySource::Environment, |name| variables.get(name).cloned())
    };
    assert_eq!(load(&variables).unwrap().bytes(), known().bytes());
    let error = load(&HashMap::new()).unwrap_err().to_string();
    assert_eq!(
        error,
        "the environment variable THENAR_MASTER_KEY is not set: set it, or keep the key in a file made with `thenar keys generate`"
    );
    let error = load(&HashMap::from([(MASTER_KEY_VARIABLE, "secret".into())])).unwrap_err().to_string();
    assert_eq!(
        error,
        "the master key in the environment variable THENAR_MASTER_KEY is malformed: it does not begin with thenar-master-key-1:"
    );
}

#[test]
fn a_systemd_credential_is_a_source_whatever_its_mode() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(CREDENTIAL);
    known().write_new(&path).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o440)).unwrap();
    let load = |name: &str, folder: Option<&Path>| {
        MasterKey::load_in(&KeySource::Credential(name.to_owned()), |variable| {
            assert_eq!(variable, "CREDENTIALS_DIRECTORY");
            folder.map(OsString::from)
        })
    };
    assert_eq!(load(CREDENTIAL, Some(folder.path())).unwrap().bytes(), known().bytes());
    assert!(matches!(load("other", Some(folder.path())), Err(KeyError::Missing { .. })));
    let error = load(CREDENTIAL, None).unwrap_err().to_string();
    assert_eq!(
        error,
        "the environment variable CREDENTIALS_DIRECTORY is not set: run under a systemd unit with LoadCredential=, or keep the key in a file"
    );
    for name in ["", ".", "..", "../master.key", "/etc/passwd"] {
        let error = load(name, Some(folder.path())).unwrap_err().to_string();
        assert_eq!(error, format!("{name:?} cannot be the name of a credential: it must be a plain file name"));
    }
}
