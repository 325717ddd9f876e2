//! Closes a connection without losing its last answers.
//!
//! When a server drains, a client may still be sending. A socket closed with unread bytes in it resets the
//! connection, and a reset discards answers that have arrived but were not read yet, and the GOAWAY frame with
//! them. So the sending half is closed first, and the remaining input is read and discarded until the client
//! has closed its half too, or for [`LINGER`].

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Sleep;

/// How long a client may take to close its half.
const LINGER: Duration = Duration::from_secs(2);

/// A client's connection. Zeroes the buffer that its reader offers whenever there is nothing to read, see
/// [`super::read_buffer`].
pub(super) struct GracefulClose {
    stream: TcpStream,
    /// Whether anything was read since the reader's buffer was zeroed.
    has_read: bool,
    /// Set once the sending half is closed.
    until: Option<Pin<Box<Sleep>>>,
}

impl GracefulClose {
    pub(super) fn new(stream: TcpStream) -> Self {
        Self { stream, has_read: false, until: None }
    }
}

impl AsyncRead for GracefulClose {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if read.is_ready() {
            self.has_read = true;
        } else if std::mem::take(&mut self.has_read) {
            buf.initialize_unfilled().fill(0);
        }
        read
    }
}

impl AsyncWrite for GracefulClose {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.until.is_none() {
            ready!(Pin::new(&mut this.stream).poll_shutdown(cx))?;
        }
        let until = this.until.get_or_insert_with(|| Box::pin(tokio::time::sleep(LINGER)));
        let mut discarded = [0; 4096];
        // The timer is polled first, so that a client that never stops sending gets no more time.
        while until.as_mut().poll(cx).is_pending() {
            let mut buf = ReadBuf::new(&mut discarded);
            match ready!(Pin::new(&mut this.stream).poll_read(cx, &mut buf)) {
                Ok(()) if !buf.filled().is_empty() => {}
                // The client has closed too, or is gone.
                Ok(()) | Err(_) => break,
            }
        }
        Poll::Ready(Ok(()))
    }
}
