//! gRPC messages from a request's body, each passed on only when it has arrived whole.
//!
//! A message is five bytes (a flag and a length) and its bytes. No memory is reserved for what the
//! length claims: memory grows with what arrives, and is charged to the [budget](super::budget) as it
//! grows. A length over the method's limit is refused as soon as its five bytes are there, and a message
//! whose lists have too many [elements] before it is decoded.

pub(super) mod elements;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, stream};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Incoming;
use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::{Code, Request, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use super::budget::{Charge, Share};
use super::status::invalid;
use elements::Field;

/// Bytes of the flag and the length before a message.
const PREFIX_BYTES: usize = 5;
/// What is reserved for a message when its first bytes arrive.
const FIRST_BYTES: usize = 4 << 10;
/// When to try again if the budget is used up.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// A message that has arrived whole.
pub(super) struct Message {
    /// With its prefix.
    bytes: Vec<u8>,
    charge: Charge,
}

/// Limits of one message of a method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MessageLimits {
    pub(super) bytes_max: usize,
    /// Where its lists are.
    pub(super) fields: &'static [Field],
}

/// Cuts bytes into messages.
struct Reader {
    limits: MessageLimits,
    share: Arc<Share>,
    prefix: Vec<u8>,
    /// The message whose prefix is complete, and its length with the prefix.
    incomplete: Option<(Message, usize)>,
}

impl Reader {
    fn new(limits: MessageLimits, share: Arc<Share>) -> Self {
        Self { limits, share, prefix: Vec::with_capacity(PREFIX_BYTES), incomplete: None }
    }

    fn is_midway(&self) -> bool {
        !self.prefix.is_empty() || self.incomplete.is_some()
    }

    /// Takes from `bytes` what belongs to the next message, and returns the message once it is whole.
    fn read(&mut self, bytes: &mut Bytes) -> Result<Option<Message>, Status> {
        let (mut message, length) = match self.incomplete.take() {
            Some(incomplete) => incomplete,
            None => {
                let taken = bytes.split_to(bytes.len().min(PREFIX_BYTES - self.prefix.len()));
                self.prefix.extend_from_slice(&taken);
                let &[flag, a, b, c, d] = self.prefix.as_slice() else { return Ok(None) };
                self.begin(flag, u32::from_be_bytes([a, b, c, d]))?
            }
        };
        let taken = bytes.split_to(bytes.len().min(length - message.bytes.len()));
        message.append(&taken, length)?;
        if message.bytes.len() == length {
            elements::count(&message.bytes[PREFIX_BYTES..], self.limits.fields).map_err(invalid)?;
            return Ok(Some(message));
        }
        self.incomplete = Some((message, length));
        Ok(None)
    }

    fn begin(&mut self, flag: u8, declared: u32) -> Result<(Message, usize), Status> {
        if flag != 0 {
            return Err(Status::unimplemented("compressed messages are not taken"));
        }
        let declared = declared as usize;
        let max = self.limits.bytes_max;
        if declared > max {
            return Err(Status::resource_exhausted(format!(
                "a message of {declared} bytes is over the limit of {max}"
            )));
        }
        let length = PREFIX_BYTES + declared;
        let mut message = Message { bytes: Vec::new(), charge: Charge::new(&self.share, length) };
        message.append(&self.prefix, length)?;
        self.prefix.clear();
        Ok((message, length))
    }
}

impl Message {
    /// Appends to a message that will have `length` bytes; reserves at most twice what has arrived.
    fn append(&mut self, bytes: &[u8], length: usize) -> Result<(), Status> {
        let needed = self.bytes.len() + bytes.len();
        if needed > self.bytes.capacity() {
            let first = if needed > PREFIX_BYTES { FIRST_BYTES } else { 0 };
            let capacity = needed.max(self.bytes.capacity() * 2).max(first).min(length);
            self.charge.add(capacity - self.bytes.capacity()).map_err(|_| exhausted())?;
            self.bytes.reserve_exact(capacity - self.bytes.len());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }
}

/// The budget is used up: try again later.
pub(super) fn exhausted() -> Status {
    Status::with_error_details(
        Code::ResourceExhausted,
        "the server holds as many bytes of messages as it may; try again later",
        ErrorDetails::with_retry_info(Some(RETRY_AFTER)),
    )
}

/// What happens to a stream when its connection has reached its age.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AtAge {
    /// It ends in order: what was read is answered.
    End,
    /// Its client is told to go on with a new connection: it would take an end for the end of its work.
    Refuse,
}

/// Time limits of the messages of one call.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    /// From a message's first byte to its last.
    pub(super) whole: Duration,
    /// From asking for a message to its first byte; `None`: as long as the call lasts.
    pub(super) silence: Option<Duration>,
}

/// The messages of one call, as they arrive.
pub(super) struct Arriving {
    body: Incoming,
    bytes: Bytes,
    reader: Reader,
    pace: Pace,
    at_age: Option<(AtAge, CancellationToken)>,
    ended: bool,
}

impl Arriving {
    /// The messages of `body`, each within `limits`, charged to `share`.
    pub(super) fn new(body: Incoming, limits: MessageLimits, share: Arc<Share>, pace: Pace) -> Self {
        Self { body, bytes: Bytes::new(), reader: Reader::new(limits, share), pace, at_age: None, ended: false }
    }

    /// The same, ended once `retiring`.
    pub(super) fn until(self, at_age: AtAge, retiring: CancellationToken) -> Self {
        Self { at_age: Some((at_age, retiring)), ..self }
    }

    /// The next message; nothing follows an error.
    async fn next(&mut self) -> Option<Result<Message, Status>> {
        if self.ended {
            return None;
        }
        let next = self.read().await.transpose();
        self.ended = !matches!(next, Some(Ok(_)));
        next
    }

    async fn read(&mut self) -> Result<Option<Message>, Status> {
        let asked = Instant::now();
        let mut begun = None;
        loop {
            if let Some(message) = self.reader.read(&mut self.bytes)? {
                // The rest is copied, so that it does not hold on to the connection's buffer.
                self.bytes = Bytes::copy_from_slice(&self.bytes);
                return Ok(Some(message));
            }
            let midway = self.reader.is_midway();
            let until = match midway {
                true => Some(*begun.get_or_insert_with(Instant::now) + self.pace.whole),
                false => self.pace.silence.map(|silence| asked + silence),
            };
            let waited = async {
                match until {
                    Some(until) => sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            let retired = async {
                match &self.at_age {
                    Some((at_age, retiring)) if !midway => {
                        retiring.cancelled().await;
                        *at_age
                    }
                    _ => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                frame = self.body.frame() => match frame {
                    Some(Ok(frame)) => self.bytes = frame.into_data().unwrap_or_default(),
                    Some(Err(_)) => return Err(Status::cancelled("the client broke off")),
                    None if midway => return Err(Status::invalid_argument("the call ended amid a message")),
                    None => return Ok(None),
                },
                at_age = retired => return match at_age {
                    AtAge::End => Ok(None),
                    AtAge::Refuse => Err(Status::unavailable("this connection has reached its age; go on on a new one")),
                },
                () = waited => return Err(Status::deadline_exceeded(match midway {
                    true => "a message took longer than server.message_seconds to arrive",
                    false => "no message came for server.message_seconds",
                })),
            }
        }
    }

    /// As the body of a request that tonic decodes. `held` gets the charge of the largest message so
    /// far, since tonic keeps its buffer.
    pub(super) fn into_body(self, held: Arc<Mutex<Option<Charge>>>) -> Body {
        let frames = stream::unfold((self, held), |(mut arriving, held)| async move {
            let next = arriving.next().await?;
            let frame = next.map(|Message { bytes, charge }| {
                let mut held = held.lock();
                if held.as_ref().is_none_or(|held| held.bytes() < charge.bytes()) {
                    *held = Some(charge);
                }
                Frame::data(Bytes::from(bytes))
            });
            Some((frame, (arriving, held)))
        });
        Body::new(StreamBody::new(frames))
    }
}

/// The messages of a streaming call, passed from [`super::calls`] to the call's handler around tonic,
/// whose own decoder would keep the memory of the largest message as long as the stream lasts.
#[derive(Clone)]
pub(super) struct Handover(Arc<Mutex<Option<Arriving>>>);

impl Handover {
    pub(super) fn new(arriving: Arriving) -> Self {
        Self(Arc::new(Mutex::new(Some(arriving))))
    }
}

/// The messages of a streaming call, each with its charge to the budget, to be kept as long as the message.
pub(super) fn stream_of<T, S>(
    request: &Request<S>,
) -> impl Stream<Item = Result<(T, Charge), Status>> + Send + use<T, S>
where
    T: prost::Message + Default,
{
    let handover = request.extensions().get::<Handover>().and_then(|handover| handover.0.lock().take());
    stream::unfold(handover, |arriving| async move {
        let mut arriving = arriving?;
        let next = arriving.next().await?;
        let decoded = next.and_then(|Message { bytes, charge }| decode(&bytes).map(|message| (message, charge)));
        Some((decoded, Some(arriving)))
    })
}

/// Decodes a message with its prefix.
fn decode<T: prost::Message + Default>(bytes: &[u8]) -> Result<T, Status> {
    T::decode(&bytes[PREFIX_BYTES..])
        .map_err(|error| Status::invalid_argument(format!("a message is malformed: {error}")))
}
