//! The state of one connection: how many requests are in flight, since when there is none, and whether
//! the connection is to end.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

/// A handle to the state of one connection; clones share it.
#[derive(Clone)]
pub(crate) struct Connection(Arc<Shared>);

struct Shared {
    activity: Mutex<Activity>,
    /// Notified when the last request in flight has ended.
    idle: Notify,
    retiring: CancellationToken,
}

struct Activity {
    in_flight: usize,
    /// When the connection began, or its last request ended.
    idle_since: Instant,
    /// Whether there has been a request.
    has_had_request: bool,
}

impl Connection {
    pub(super) fn new() -> Self {
        let activity = Activity { in_flight: 0, idle_since: Instant::now(), has_had_request: false };
        Self(Arc::new(Shared {
            activity: Mutex::new(activity),
            idle: Notify::new(),
            retiring: CancellationToken::new(),
        }))
    }

    /// A request is in flight until the returned value is dropped.
    pub(super) fn begin_request(&self) -> RequestInFlight {
        let mut activity = self.0.activity.lock();
        activity.in_flight += 1;
        activity.has_had_request = true;
        RequestInFlight(self.clone())
    }

    /// Returns once no first request has come for `first_request`, or none has been in flight for `idle`.
    pub(super) async fn idle_timeout(&self, first_request: Duration, idle: Duration) {
        let began = Instant::now();
        loop {
            let until = {
                let activity = self.0.activity.lock();
                match (activity.in_flight, activity.has_had_request) {
                    (0, false) => Some(began + first_request),
                    (0, true) => Some(activity.idle_since + idle),
                    _ => None,
                }
            };
            match until {
                None => self.0.idle.notified().await,
                Some(until) if until <= Instant::now() => return,
                Some(until) => sleep_until(until).await,
            }
        }
    }

    /// The connection is to end: streams on it end in order, after what they have read.
    pub(super) fn retire(&self) {
        self.0.retiring.cancel();
    }

    /// Cancelled once the connection is to end although the server goes on.
    pub(crate) fn retiring(&self) -> &CancellationToken {
        &self.0.retiring
    }
}

/// One request in flight.
pub(super) struct RequestInFlight(Connection);

impl Drop for RequestInFlight {
    fn drop(&mut self) {
        let mut activity = self.0.0.activity.lock();
        activity.in_flight -= 1;
        if activity.in_flight == 0 {
            activity.idle_since = Instant::now();
            self.0.0.idle.notify_one();
        }
    }
}

/// The body of a response, with a guard that is dropped when the body has been sent.
pub(crate) struct GuardedBody<B, G> {
    body: B,
    _guard: G,
}

impl<B, G> GuardedBody<B, G> {
    pub(crate) fn new(body: B, guard: G) -> Self {
        Self { body, _guard: guard }
    }
}

impl<B: Body<Data = Bytes> + Unpin, G: Unpin> Body for GuardedBody<B, G> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::sleep;

    const FIRST: Duration = Duration::from_millis(50);
    const IDLE: Duration = Duration::from_millis(200);

    async fn took(of: impl Future<Output = ()>) -> Duration {
        let began = Instant::now();
        of.await;
        began.elapsed()
    }

    #[tokio::test]
    async fn a_client_without_a_request_times_out_sooner_than_one_that_has_had_one() {
        let connection = Connection::new();
        let first = took(connection.idle_timeout(FIRST, IDLE)).await;
        assert!(first >= FIRST && first < IDLE, "{first:?}");
        drop(connection.begin_request());
        assert!(took(connection.idle_timeout(FIRST, IDLE)).await >= IDLE.mul_f64(0.9));
    }

    #[tokio::test]
    async fn a_request_in_flight_is_not_idle_time() {
        let connection = Connection::new();
        let (one, other) = (connection.begin_request(), connection.begin_request());
        let ending = async {
            sleep(IDLE * 2).await;
            drop(one);
            sleep(IDLE * 2).await;
            drop(other);
            // Another request in the meantime postpones the timeout.
            sleep(IDLE / 2).await;
            drop(connection.begin_request());
        };
        let (took, ()) = tokio::join!(took(connection.idle_timeout(FIRST, IDLE)), ending);
        assert!(took >= IDLE.mul_f64(5.4), "{took:?}");
    }
}
