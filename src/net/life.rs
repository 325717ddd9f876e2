//! What one connection is doing: how many requests are under way, and since when there is none.

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

/// The life of one connection; clones are of the same one.
#[derive(Clone)]
pub(crate) struct Life(Arc<Shared>);

struct Shared {
    now: Mutex<Now>,
    /// Told when the last request under way has ended.
    quiet: Notify,
    retiring: CancellationToken,
}

struct Now {
    under_way: usize,
    /// When the connection began, or its last request ended.
    since: Instant,
    /// Whether there ever was a request.
    asked: bool,
}

impl Life {
    pub(super) fn new() -> Self {
        let now = Now { under_way: 0, since: Instant::now(), asked: false };
        Self(Arc::new(Shared { now: Mutex::new(now), quiet: Notify::new(), retiring: CancellationToken::new() }))
    }

    /// A request is under way until the returned value is dropped.
    pub(super) fn begin(&self) -> UnderWay {
        let mut now = self.0.now.lock();
        now.under_way += 1;
        now.asked = true;
        UnderWay(self.clone())
    }

    /// Returns once there was no first request for `first_request`, or none under way for `idle`.
    pub(super) async fn quiet(&self, first_request: Duration, idle: Duration) {
        let began = Instant::now();
        loop {
            let until = {
                let now = self.0.now.lock();
                match (now.under_way, now.asked) {
                    (0, false) => Some(began + first_request),
                    (0, true) => Some(now.since + idle),
                    _ => None,
                }
            };
            match until {
                None => self.0.quiet.notified().await,
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

/// One request that is under way.
pub(super) struct UnderWay(Life);

impl Drop for UnderWay {
    fn drop(&mut self) {
        let mut now = self.0.0.now.lock();
        now.under_way -= 1;
        if now.under_way == 0 {
            now.since = Instant::now();
            self.0.0.quiet.notify_one();
        }
    }
}

/// The body of an answer with something that is kept until it has been sent.
pub(crate) struct Guarded<B, G> {
    body: B,
    _guard: G,
}

impl<B, G> Guarded<B, G> {
    pub(crate) fn new(body: B, guard: G) -> Self {
        Self { body, _guard: guard }
    }
}

impl<B: Body<Data = Bytes> + Unpin, G: Unpin> Body for Guarded<B, G> {
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
    async fn who_never_asks_is_idle_soon_and_who_has_asked_later() {
        let life = Life::new();
        let first = took(life.quiet(FIRST, IDLE)).await;
        assert!(first >= FIRST && first < IDLE, "{first:?}");
        drop(life.begin());
        assert!(took(life.quiet(FIRST, IDLE)).await >= IDLE.mul_f64(0.9));
    }

    #[tokio::test]
    async fn a_request_under_way_is_no_idle_time() {
        let life = Life::new();
        let (one, other) = (life.begin(), life.begin());
        let ending = async {
            sleep(IDLE * 2).await;
            drop(one);
            sleep(IDLE * 2).await;
            drop(other);
            // A further one in the meantime puts the end off.
            sleep(IDLE / 2).await;
            drop(life.begin());
        };
        let (took, ()) = tokio::join!(took(life.quiet(FIRST, IDLE)), ending);
        assert!(took >= IDLE.mul_f64(5.4), "{took:?}");
    }
}
