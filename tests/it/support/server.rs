//! A server under test: the real binary, a data folder and a key of its own, its log kept.
//!
//! Does not know what a test asks the server.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tonic::transport::{Channel, Endpoint};

use super::client::{Client, enrolments};
use super::palms::Palm;
use super::processes::{THENAR, command, program, text, thenar, wait};

/// How long a server may take to start or to end. Generous: tests share two cores.
const PATIENCE: Duration = Duration::from_secs(60);

/// How a test wants its server. Everything else is small and fast.
#[derive(Clone)]
pub(crate) struct Options {
    /// Components of an embedding.
    pub(crate) dim: Option<usize>,
    /// Lines of `[engine]`.
    pub(crate) engine: String,
    /// Lines before the first section.
    pub(crate) top: String,
    /// Lines of `[server]` after `listen`.
    pub(crate) server: String,
    /// Lines of `[batch]`.
    pub(crate) batch: String,
    /// `storage.reserve_mib`.
    pub(crate) reserve_mib: u64,
    /// `log.level`.
    pub(crate) level: &'static str,
    /// Further sections.
    pub(crate) more: String,
    /// `server.listen`.
    pub(crate) listen: String,
    /// `metrics.listen`.
    pub(crate) metrics: String,
    /// Where the data folder is, if not in the site's own folder.
    pub(crate) data: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            dim: Some(64),
            engine: "kind = \"cpu\"\nthreads = 2".into(),
            top: String::new(),
            server: "drain_seconds = 20".into(),
            // A slow machine is no reason to refuse what a test asks.
            batch: "wait_ms_max = 60000".into(),
            reserve_mib: 16,
            level: "info",
            more: String::new(),
            listen: "127.0.0.1:0".into(),
            metrics: "127.0.0.1:0".into(),
            data: None,
        }
    }
}

impl Options {
    /// The defaults with that many components.
    pub(crate) fn dim(dim: usize) -> Self {
        Self { dim: Some(dim), ..Self::default() }
    }
}

/// A place on the disk for one server: folder, key and configuration. Outlives its processes.
pub(crate) struct Site {
    pub(crate) dir: TempDir,
    pub(crate) options: Options,
    /// Files and sockets that its servers may open, if not as many as this process.
    pub(crate) nofile: Option<u64>,
    /// Whether the memory of its servers is closed, as it is outside tests.
    pub(crate) closed: bool,
}

impl Site {
    /// A new folder with a new key.
    pub(crate) fn new(options: Options) -> Self {
        let dir = tempfile::Builder::new().prefix("thenar-it-").tempdir().expect("a temporary folder");
        let site = Self { dir, options, nofile: None, closed: false };
        let made = thenar(&["keys", "generate", "--out", site.key().to_str().expect("a plain path")]);
        assert!(made.status.success(), "keys generate: {}", text(&made));
        site
    }

    pub(crate) fn key(&self) -> PathBuf {
        self.dir.path().join("master.key")
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.options.data.clone().unwrap_or_else(|| self.dir.path().join("data"))
    }

    pub(crate) fn config_file(&self) -> PathBuf {
        self.dir.path().join("thenar.toml")
    }

    /// The configuration as text.
    pub(crate) fn config(&self) -> String {
        let o = &self.options;
        let mut text = format!("data = {:?}\nkey_file = {:?}\n", self.data(), self.key());
        if let Some(dim) = o.dim {
            let _ = writeln!(text, "dim = {dim}");
        }
        let _ = write!(
            text,
            "{}\n[server]\nlisten = {:?}\n{}\n[metrics]\nlisten = {:?}\n[engine]\n{}\n[batch]\n{}\n\
             [storage]\nreserve_mib = {}\n[log]\nlevel = {:?}\n{}\n",
            o.top, o.listen, o.server, o.metrics, o.engine, o.batch, o.reserve_mib, o.level, o.more
        );
        text
    }

    /// Starts a server here and waits until it takes calls.
    pub(crate) fn start(self) -> TestServer {
        TestServer::launch(self, Arc::default())
    }

    /// Starts a server here and kills it `after` some time, ready or not.
    pub(crate) fn start_and_kill9(&self, after: Duration) {
        std::fs::write(self.config_file(), self.config()).expect("the configuration is written");
        let config = self.config_file();
        let mut child = command(&["serve", "--config", config.to_str().expect("a plain path")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the server runs");
        std::thread::sleep(after);
        child.kill().expect("the server is there");
        child.wait().expect("it is ours");
    }

    /// Runs a server that is expected to give up by itself.
    pub(crate) fn expect_no_start(&self) -> (Option<i32>, String) {
        std::fs::write(self.config_file(), self.config()).expect("the configuration is written");
        self.run_to_end(&["serve", "--config", self.config_file().to_str().expect("a plain path")])
    }

    /// The program with `args`, in an environment that this site asks for.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = match self.nofile {
            None => command(args),
            Some(nofile) => {
                let limited = "ulimit -n $1 && shift && exec \"$@\"";
                let mut words = vec!["-c", limited, "sh"];
                let nofile = nofile.to_string();
                words.extend([nofile.as_str(), THENAR]);
                words.extend(args);
                program("sh", &words)
            }
        };
        if self.closed {
            command.env_remove("THENAR_DEBUGGABLE");
        }
        command
    }

    /// Runs the program with these arguments to its end; it may take a minute.
    pub(crate) fn run_to_end(&self, args: &[&str]) -> (Option<i32>, String) {
        let mut child =
            self.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program runs");
        let ended = wait(&mut child, PATIENCE);
        if ended.is_none() {
            child.kill().expect("it can be killed");
        }
        let output = child.wait_with_output().expect("its output is read");
        let all = text(&output);
        assert!(ended.is_some(), "`thenar {}` did not end by itself:\n{all}", args.join(" "));
        (output.status.code(), all)
    }

    /// `thenar verify` on this folder: whether it is sound, and what it said.
    pub(crate) fn verify(&self) -> (Option<i32>, String) {
        self.run_to_end(&["verify", "--config", self.config_file().to_str().expect("a plain path")])
    }
}

/// A running server. Killed when dropped; its log is printed if the test is failing.
pub(crate) struct TestServer {
    pub(crate) site: Site,
    pub(crate) addr: SocketAddr,
    pub(crate) metrics: SocketAddr,
    child: Child,
    log: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
}

impl TestServer {
    /// A server over a new folder.
    pub(crate) fn start(options: Options) -> Self {
        Site::new(options).start()
    }

    /// A server over a new folder that knows these people, one template each, and a client.
    pub(crate) async fn with(options: Options, people: &[(String, Palm)]) -> (Self, Client) {
        let server = Self::start(options);
        let mut client = server.client().await;
        client.bulk(enrolments(people)).await;
        (server, client)
    }

    fn launch(site: Site, log: Arc<Mutex<String>>) -> Self {
        std::fs::write(site.config_file(), site.config()).expect("the configuration is written");
        let config = site.config_file();
        let mut child = site
            .command(&["serve", "--config", config.to_str().expect("a plain path")])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the server runs");
        let stderr = child.stderr.take().expect("it is piped");
        let keep = Arc::clone(&log);
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let mut log = keep.lock().expect("nobody panics with the log");
                log.push_str(&line);
                log.push('\n');
            }
        });
        let mut lines = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        let mut next = |prefix: &str| -> Option<SocketAddr> {
            let line = lines.next()?.ok()?;
            let address = line.strip_prefix(prefix)?;
            address.trim_end_matches("/metrics").parse().ok()
        };
        let addresses = next("thenar listening on ").zip(next("metrics at http://"));
        let Some((addr, metrics)) = addresses else {
            let _ = child.kill();
            let _ = child.wait();
            let _ = reader.join();
            panic!("the server did not start:\n{}", log.lock().expect("nobody panics with the log"));
        };
        Self { site, addr, metrics, child, log, reader: Some(reader) }
    }

    /// SIGKILL: as close to a power cut as a process comes.
    pub(crate) fn kill9(mut self) -> Site {
        self.child.kill().expect("the server is there");
        self.child.wait().expect("it is ours");
        self.into_site()
    }

    /// Asks the process to stop.
    pub(crate) fn sigterm(&self) {
        self.signal(Signal::TERM);
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("the server is there");
    }

    /// Waits for the process to end by itself.
    pub(crate) fn wait(&mut self, patience: Duration) -> ExitStatus {
        wait(&mut self.child, patience).expect("the server ends in time")
    }

    /// SIGTERM, and a clean end.
    pub(crate) fn terminate(mut self) -> Site {
        self.sigterm();
        let status = self.wait(PATIENCE);
        assert!(status.success(), "a drained server exits 0, this one: {status}");
        self.into_site()
    }

    /// A clean stop and a new start over the same folder.
    pub(crate) fn restart(self) -> Self {
        let log = Arc::clone(&self.log);
        Self::launch(self.terminate(), log)
    }

    /// SIGKILL and a new start over the same folder.
    pub(crate) fn kill9_and_restart(self) -> Self {
        let log = Arc::clone(&self.log);
        Self::launch(self.kill9(), log)
    }

    /// The place of a server that has ended.
    pub(crate) fn into_site(mut self) -> Site {
        if let Some(reader) = self.reader.take() {
            reader.join().expect("the log's reader ends with the process");
        }
        let empty = Site {
            dir: tempfile::tempdir().expect("a temporary folder"),
            options: Options::default(),
            nofile: None,
            closed: false,
        };
        std::mem::replace(&mut self.site, empty)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether the process has not ended.
    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("the child is ours").is_none()
    }

    /// Everything logged so far, over all starts.
    pub(crate) fn log(&self) -> String {
        self.log.lock().expect("nobody panics with the log").clone()
    }

    /// Waits until the log has `words`.
    pub(crate) fn wait_for_log(&self, words: &str) {
        let until = Instant::now() + PATIENCE;
        while !self.log().contains(words) {
            assert!(Instant::now() < until, "the log never said {words:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// A connection of its own.
    pub(crate) async fn channel(&self) -> Channel {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.addr)).expect("an address");
        endpoint.tcp_nodelay(true).connect().await.expect("the server takes connections")
    }

    /// A client on a connection of its own.
    pub(crate) async fn client(&self) -> Client {
        Client::new(self.channel().await)
    }

    /// GETs a path of the metrics server: status code and body.
    pub(crate) fn http(&self, path: &str) -> std::io::Result<(u16, String)> {
        let mut stream = TcpStream::connect_timeout(&self.metrics, Duration::from_secs(5))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: thenar\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let code = answer.split(' ').nth(1).and_then(|c| c.parse().ok()).unwrap_or(0);
        let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default();
        Ok((code, body))
    }

    /// The metrics page.
    pub(crate) fn metrics_text(&self) -> String {
        let (code, body) = self.http("/metrics").expect("metrics are served");
        assert_eq!(code, 200);
        body
    }

    /// The value of one series of the metrics page.
    pub(crate) fn metric(&self, series: &str) -> Option<f64> {
        let page = self.metrics_text();
        page.lines().find_map(|l| l.strip_prefix(series)?.strip_prefix(' ')?.trim().parse().ok())
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        if std::thread::panicking() {
            eprintln!("--- the server's log ---\n{}--- end of the log ---", self.log());
        }
    }
}
