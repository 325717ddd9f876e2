//! A data folder as the target of an import, without a server.
//!
//! [`Folder`] opens it as a server would, alone and under the lock; [`FolderSink`] submits the
//! messages to the same bulk enrolment that a server's clients reach over gRPC. So both kinds of
//! import check, commit and answer alike, and request ids mean the same in both.
//!
//! Invariant: a [`Folder`] is closed (index checkpointed, lock released) after the sinks over it
//! are; a process killed before that loses nothing that was acknowledged.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{ArgGroup, Args};
use futures::StreamExt as _;
use thenar_index::Lsn;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::api;
use crate::api::proto::{BulkEnrollProgress, BulkEnrollRequest};
use crate::cli::args::DataFolderArgs;
use crate::cli::blocking;
use crate::cli::bulk::{Acknowledgement, IN_FLIGHT_MAX, Sink, Tally};
use crate::cli::embeddings::EmbeddingsFile;
use crate::cli::error::CliError;
use crate::cli::output::start_log_of_warnings;
use crate::process::supervisor::Supervisor;
use crate::registry::Registry as _;
use crate::registry::sqlite::SqliteRegistry;
use crate::server::config::{Config, ConfigError, EngineKind};
use crate::server::data_folder::{DataFolder, FolderError};
use crate::server::{self, Opened, ServerError, key_source};
use crate::vault::{MasterKey, Vault};

/// The data folder to enrol in, instead of a server.
#[derive(Debug, Clone, Default, Args)]
#[command(
    next_help_heading = "Data folder, instead of a server",
    group = ArgGroup::new("folder").args(["data", "config"]).multiple(true)
)]
pub(super) struct FolderArgs {
    /// Enrol straight into this data folder, which no server may be using. An empty gallery, or a
    /// new one, takes the array's dimension.
    #[arg(long, value_name = "DIR", conflicts_with_all = CONFLICTS)]
    data: Option<PathBuf>,
    /// Configuration file (TOML) of the server that the folder belongs to. Flags override it.
    #[arg(long, value_name = "FILE", conflicts_with_all = CONFLICTS)]
    config: Option<PathBuf>,
    /// Master key, made by `thenar keys generate`. Default: the one that --config names, the systemd
    /// credential or THENAR_MASTER_KEY.
    #[arg(long, value_name = "FILE", conflicts_with_all = CONFLICTS, requires = "folder")]
    key_file: Option<PathBuf>,
}

/// Options that are about a server.
const CONFLICTS: [&str; 7] = ["server", "ca", "cert", "key", "server_name", "connect_timeout", "retry_seconds"];

impl FolderArgs {
    /// Whether a folder is asked for, not a server.
    pub(super) fn are_given(&self) -> bool {
        self.data.is_some() || self.config.is_some()
    }

    /// The configuration of the folder, before it is opened.
    fn config(&self) -> Result<Config, ConfigError> {
        let Self { config, data, key_file } = self.clone();
        let mut config = DataFolderArgs { config, data, key_file, ..DataFolderArgs::default() }.config(|_| {})?;
        // Nobody searches here, so no GPU is worth opening.
        config.engine.kind = EngineKind::Cpu;
        Ok(config)
    }
}

/// A data folder that this process has to itself, open for enrolling.
pub(super) struct Folder {
    opened: Opened,
    path: PathBuf,
    is_new: bool,
}

impl Folder {
    /// Opens the folder that `args` name, for an array of `embeddings`; makes the gallery if there is
    /// none.
    ///
    /// # Errors
    /// [`CliError`] if the configuration is invalid, the folder, the key or the gallery is not usable,
    /// or the gallery has another dimension.
    pub(super) async fn open(args: &FolderArgs, embeddings: &EmbeddingsFile) -> Result<Self, CliError> {
        let mut config = args.config()?;
        start_log_of_warnings(&config.log);
        let (array, dim) = (embeddings.path().to_owned(), embeddings.dim());
        blocking(move || {
            let held = dimension(&config)?;
            if let Some(expected) = held.or(config.dim)
                && expected != dim
            {
                return Err(CliError::OtherDimension { path: array, found: dim, expected });
            }
            config.dim = Some(dim);
            // Not told of signals: after one, what is in flight is to be finished, not refused.
            let opened = server::open(&config, &Supervisor::default()).map_err(in_use)?;
            // Without links, so that the same folder has the same name in every state file.
            let path = config.data.canonicalize().unwrap_or(config.data);
            Ok(Self { opened, path, is_new: held.is_none() })
        })
        .await
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the gallery was made by opening it.
    pub(super) fn is_new(&self) -> bool {
        self.is_new
    }

    /// Checkpoints the index and lets go of the folder. Every sink over it must be closed before.
    pub(super) async fn close(self) {
        blocking(move || self.opened.close()).await;
    }
}

/// The dimension of the gallery in a data folder; none if nobody was ever enrolled.
fn dimension(config: &Config) -> Result<Option<usize>, CliError> {
    let folder = match DataFolder::take_existing(&config.data) {
        Ok(folder) => folder,
        Err(FolderError::Empty { .. }) => return Ok(None),
        Err(error) => return Err(in_use(error.into())),
    };
    let key = MasterKey::load(&key_source(config.key_file.as_deref()))?;
    let registry = SqliteRegistry::open(&folder.registry(), Vault::new(key).registry_keys())?;
    let used = registry.last_lsn()? > Lsn(0);
    Ok(registry.identity()?.filter(|_| used).map(|(identity, _)| identity.dim))
}

/// Says what else can be done if another process has the folder.
fn in_use(error: ServerError) -> CliError {
    match error {
        ServerError::Folder(FolderError::InUse { path }) => CliError::ImportFolderInUse { path },
        error => error.into(),
    }
}

/// A folder's bulk enrolment, in this process.
pub(super) struct FolderSink {
    requests: mpsc::Sender<BulkEnrollRequest>,
    answers: mpsc::Receiver<Result<BulkEnrollProgress, Status>>,
    enrolling: JoinHandle<()>,
    /// Subjects of each message that is not acknowledged.
    in_flight: VecDeque<usize>,
    tally: Tally,
}

impl FolderSink {
    /// A sink into `folder`.
    pub(super) fn new(folder: &Folder) -> Self {
        let (requests, queue) = mpsc::channel(IN_FLIGHT_MAX);
        let (sender, answers) = mpsc::channel(IN_FLIGHT_MAX);
        let mut progress = Box::pin(api::bulk_enroll(
            Arc::clone(&folder.opened.service),
            ReceiverStream::new(queue).map(|message| Ok((message, ()))),
        ));
        let enrolling = tokio::spawn(async move {
            while let Some(answer) = progress.next().await {
                // Without a receiver nobody waits for the rest.
                if sender.send(answer).await.is_err() {
                    return;
                }
            }
        });
        Self { requests, answers, enrolling, in_flight: VecDeque::new(), tally: Tally::default() }
    }

    /// Lets go of the folder; messages in flight are no longer waited for.
    pub(super) async fn close(self) {
        let Self { requests, answers, enrolling, .. } = self;
        drop((requests, answers));
        if let Err(panicked) = enrolling.await {
            std::panic::resume_unwind(panicked.into_panic());
        }
    }

    fn settle(&mut self, answer: BulkEnrollProgress) -> Acknowledgement {
        self.tally.settle(answer, &mut self.in_flight, |items| *items)
    }

    async fn receive(&mut self) -> Result<Acknowledgement, CliError> {
        match self.answers.recv().await {
            Some(Ok(answer)) => Ok(self.settle(answer)),
            Some(Err(status)) => Err(CliError::refused("BulkEnroll", status)),
            None => Err(CliError::Protocol {
                call: "BulkEnroll",
                problem: "it ended before everything was acknowledged".to_owned(),
            }),
        }
    }
}

impl Sink for FolderSink {
    async fn submit(&mut self, message: BulkEnrollRequest) -> Result<Vec<Acknowledgement>, CliError> {
        let mut acknowledged = Vec::new();
        while self.in_flight.len() >= IN_FLIGHT_MAX {
            acknowledged.push(self.receive().await?);
        }
        self.in_flight.push_back(message.items.len());
        // If the other end is gone, the next `receive` says why.
        let _ = self.requests.send(message).await;
        while let Ok(Ok(answer)) = self.answers.try_recv() {
            acknowledged.push(self.settle(answer));
        }
        Ok(acknowledged)
    }

    async fn finish(&mut self) -> Result<Vec<Acknowledgement>, CliError> {
        let mut acknowledged = Vec::new();
        while !self.in_flight.is_empty() {
            acknowledged.push(self.receive().await?);
        }
        Ok(acknowledged)
    }
}
