use super::*;
use crate::model::Purpose;

fn parsed(text: &str) -> Result<Config, ConfigError> {
    let raw: Raw =
        toml::from_str(text).map_err(|e| ConfigError::Malformed { path: "test".into(), source: Box::new(e) })?;
    raw.validated()
}

fn problems(text: &str) -> Vec<String> {
    match parsed(text) {
        Err(ConfigError::Invalid { problems }) => problems,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_data_folder_is_all_that_is_needed() {
    let config = parsed("data = \"/var/lib/thenar\"").unwrap();
    assert_eq!(config.server.listen.to_string(), "127.0.0.1:7600");
    assert!(config.server.tls.is_none());
    assert_eq!(config.engine.kind, EngineKind::Auto);
    assert!(config.engine.matrices);
    assert!(!parsed("data = \"d\"\n[engine]\nmatrices = false").unwrap().engine.matrices);
    assert_eq!(config.policies.of(Purpose::Payment).threshold, 0.62);
}

#[test]
fn the_commented_default_file_says_what_the_defaults_are() {
    let shipped: Raw = toml::from_str(include_str!("../../../deploy/thenar.toml")).unwrap();
    let shipped = shipped.validated().unwrap();
    let data = shipped.data.clone();
    let mut bare = Raw { data: Some(data), ..Raw::default() }.validated().unwrap();
    bare.key_file.clone_from(&shipped.key_file);
    assert_eq!(shipped, bare);
}

#[test]
fn beyond_loopback_there_is_no_server_without_mutual_tls() {
    let all = problems("data = \"d\"\n[server]\nlisten = \"0.0.0.0:7600\"");
    assert!(all[0].contains("[server.tls]"), "{all:?}");
    let all =
        problems("data = \"d\"\n[server]\nlisten = \"0.0.0.0:7600\"\n[server.tls]\ncertificate = \"c\"\nkey = \"k\"");
    assert!(all[0].starts_with("server.tls.client_ca"), "{all:?}");
    let good = "data = \"d\"\n[server]\nlisten = \"[::]:7600\"\n[server.tls]\ncertificate = \"c\"\nkey = \"k\"\nclient_ca = \"a\"";
    assert!(parsed(good).unwrap().server.tls.is_some());
}

#[test]
fn beyond_loopback_there_are_no_metrics_unless_the_file_says_so_in_words() {
    for listen in ["0.0.0.0:7601", "[::]:7601", "192.0.2.7:7601"] {
        let section = format!("data = \"d\"\n[metrics]\nlisten = \"{listen}\"\n");
        for word in ["", "beyond_loopback = false"] {
            let all = problems(&format!("{section}{word}"));
            assert_eq!(all.len(), 1, "{all:?}");
            assert!(all[0].starts_with("metrics.listen:") && all[0].contains("metrics.beyond_loopback"), "{all:?}");
        }
        let config = parsed(&format!("{section}beyond_loopback = true")).unwrap();
        assert_eq!(config.metrics, Some(listen.parse().unwrap()));
    }
    assert!(parsed("data = \"d\"\n[metrics]\nlisten = \"[::1]:7601\"").is_ok());
    assert!(parsed("data = \"d\"\n[metrics]\nlisten = \"off\"").is_ok());
}

#[test]
fn every_problem_is_reported_at_once() {
    let all = problems(
        "dim = 500\nvenues = [\"a b\"]\n[server]\nlisten = \"here\"\ndrain_seconds = 0\n[engine]\nkind = \"fpga\"\nthreads = 0\n[batch]\nqueue_max = 0\n[policy.entry]\nthreshold = 2.0\n[log]\nformat = \"xml\"",
    );
    for key in [
        "data",
        "dim",
        "venues.venue_id",
        "server.listen",
        "server.drain_seconds",
        "engine.kind",
        "engine.threads",
        "batch.queue_max",
        "policy.entry.threshold",
        "log.format",
    ] {
        assert!(all.iter().any(|p| p.starts_with(&format!("{key}:"))), "{key} in {all:?}");
    }
    assert_eq!(all.len(), 10, "{all:?}");
}

#[test]
fn an_unknown_key_is_refused_by_name() {
    let error = parsed("data = \"d\"\ntreshold = 1").unwrap_err().to_string();
    assert!(error.contains("treshold"), "{error}");
}

#[test]
fn a_certificate_is_randomised_unless_the_file_says_otherwise() {
    let of = |search: &str| {
        let text = format!("data = \"d\"\n{search}");
        toml::from_str::<Raw>(&text).unwrap().validated().map(|config| config.certificate)
    };
    let randomised = |miss_probability| Certificate::Randomised { miss_probability };
    assert_eq!(of("").unwrap(), randomised(1e-12));
    assert_eq!(of("[search]\nmiss_probability = 1e-9").unwrap(), randomised(1e-9));
    assert_eq!(of("[search]\ncertificate = \"deterministic\"").unwrap(), Certificate::Deterministic);
    for (bad, word) in [
        ("miss_probability = 1e-3", "search.miss_probability: 1e-3"),
        ("certificate = \"none\"", "search.certificate: \"none\""),
        ("certificate = \"deterministic\"\nmiss_probability = 1e-9", "search.miss_probability"),
    ] {
        let error = of(&format!("[search]\n{bad}")).unwrap_err().to_string();
        assert!(error.contains(word), "{bad}: {error}");
    }
}
