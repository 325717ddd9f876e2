//! Connections whose readers keep nothing of what they have read.
//!
//! Libraries read into buffers of their own and use them again, so what came last stays in them until
//! more comes, which may be never. But a reader offers its buffer to whatever it reads from, and that
//! may write to all it is offered, not only hand on bytes. So, whenever no more has come:
//!
//! - rustls decrypts in place, and begins its buffer anew with every read: [`super::graceful_close`] under it
//!   zeroes what it offers.
//! - h2 goes on behind what it has read, and begins its buffer anew only when that is full. So
//!   [`Overwriting`] fills the rest of it, with a frame of zeros that ends where the buffer does. Its
//!   type is one that HTTP/2 keeps for experiments, and frames of unknown types are to be ignored (RFC
//!   9113, 4.1 and 5.5). What h2 offers then is its buffer from the beginning, and is zeroed; or a new
//!   one, if a call has parts of this one still: the allocator zeroes this one when the call lets go.
//!
//! What is left out: bytes before a frame that has not come whole, until it has.
//! Knows where HTTP/2's frames begin. Does not know what is in them.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What every client of HTTP/2 sends first.
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Length, type, flags and stream of a frame.
const HEAD_BYTES: usize = 9;
/// The largest payload that may come without having been agreed on.
const PAYLOAD_BYTES_MAX: usize = 1 << 14;
/// Types of frames.
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const EXPERIMENTAL: u8 = 0xff;
/// The flag of the last frame of a header.
const END_HEADERS: u8 = 4;

/// The bytes of a connection, for a reader of HTTP/2 that is to keep none of them.
pub(super) struct Overwriting<I> {
    io: I,
    frames: Frames,
    /// What the reader's buffer may have of the client's data.
    kept: Kept,
}

enum Kept {
    Nothing,
    /// Behind what it offers.
    Behind,
    /// The same; a frame of zeros is being handed on.
    Overwritten(Filling),
    /// In what it offers next.
    Offered,
}

impl<I> Overwriting<I> {
    pub(super) fn new(io: I) -> Self {
        Self { io, frames: Frames::new(), kept: Kept::Nothing }
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Overwriting<I> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !matches!(this.kept, Kept::Overwritten(_)) {
            let before = buf.filled().len();
            if let Poll::Ready(read) = Pin::new(&mut this.io).poll_read(cx, buf) {
                if this.frames.read(&buf.filled()[before..]) {
                    this.kept = Kept::Behind;
                }
                return Poll::Ready(read);
            }
            match this.kept {
                Kept::Behind if this.frames.are_whole() && buf.remaining() > 0 => {
                    this.kept = Kept::Overwritten(Filling::new(buf.remaining()));
                }
                Kept::Offered => {
                    buf.initialize_unfilled().fill(0);
                    this.kept = Kept::Nothing;
                    return Poll::Pending;
                }
                _ => return Poll::Pending,
            }
        }
        if let Kept::Overwritten(filling) = &mut this.kept {
            filling.put(buf);
            if filling.left() == 0 {
                // Where more was left of the buffer than a frame may have, another one follows.
                this.kept = if filling.is_cut_short { Kept::Behind } else { Kept::Offered };
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Overwriting<I> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// A frame of zeros, on its way into a buffer.
struct Filling {
    head: [u8; HEAD_BYTES],
    bytes: usize,
    put: usize,
    is_cut_short: bool,
}

impl Filling {
    /// A frame that ends where `room` bytes do; the shortest, or the longest, if that cannot be.
    fn new(room: usize) -> Self {
        let payload = room.saturating_sub(HEAD_BYTES).min(PAYLOAD_BYTES_MAX);
        let bytes = HEAD_BYTES + payload;
        let mut head = [0; HEAD_BYTES];
        let length = u32::try_from(payload).unwrap_or(0).to_be_bytes();
        head[..3].copy_from_slice(&length[1..]);
        head[3] = EXPERIMENTAL;
        Self { head, bytes, put: 0, is_cut_short: bytes < room }
    }

    fn left(&self) -> usize {
        self.bytes - self.put
    }

    fn put(&mut self, buf: &mut ReadBuf<'_>) {
        let of_head = &self.head[self.put.min(HEAD_BYTES)..];
        let of_head = &of_head[..of_head.len().min(buf.remaining())];
        buf.put_slice(of_head);
        let zeros = (self.left() - of_head.len()).min(buf.remaining());
        buf.initialize_unfilled_to(zeros).fill(0);
        buf.advance(zeros);
        self.put += of_head.len() + zeros;
    }
}

/// How far a client's frames have come.
struct Frames {
    place: Place,
    /// A header is not whole, and only its next part may follow.
    is_amid_header: bool,
}

enum Place {
    /// So many bytes of the preface have come.
    Preface(usize),
    /// So many bytes of a frame's head have.
    Head([u8; HEAD_BYTES], usize),
    /// So many bytes of a frame's payload have not; whether they are data.
    Payload(usize, bool),
    /// This is not HTTP/2.
    Foreign,
}

impl Place {
    const NEXT: Self = Self::Head([0; HEAD_BYTES], 0);
}

impl Frames {
    fn new() -> Self {
        Self { place: Place::Preface(0), is_amid_header: false }
    }

    /// Whether a frame may follow.
    fn are_whole(&self) -> bool {
        matches!(self.place, Place::Head(_, 0)) && !self.is_amid_header
    }

    /// Goes on over `bytes`. Returns whether there is data among them.
    fn read(&mut self, mut bytes: &[u8]) -> bool {
        let mut has_data = false;
        while !bytes.is_empty() {
            match &mut self.place {
                Place::Preface(come) => {
                    let wanted = &PREFACE[*come..];
                    let taken = wanted.len().min(bytes.len());
                    *come += taken;
                    if bytes[..taken] != wanted[..taken] {
                        self.place = Place::Foreign;
                    } else if *come == PREFACE.len() {
                        self.place = Place::NEXT;
                    }
                    bytes = &bytes[taken..];
                }
                Place::Head(head, come) => {
                    let taken = (HEAD_BYTES - *come).min(bytes.len());
                    head[*come..*come + taken].copy_from_slice(&bytes[..taken]);
                    *come += taken;
                    bytes = &bytes[taken..];
                    if *come == HEAD_BYTES {
                        let [a, b, c, kind, flags, ..] = *head;
                        if matches!(kind, HEADERS | CONTINUATION) {
                            self.is_amid_header = flags & END_HEADERS == 0;
                        }
                        self.place = match u32::from_be_bytes([0, a, b, c]) as usize {
                            0 => Place::NEXT,
                            payload => Place::Payload(payload, kind == DATA),
                        };
                    }
                }
                Place::Payload(left, is_data) => {
                    has_data |= *is_data;
                    let taken = (*left).min(bytes.len());
                    *left -= taken;
                    bytes = &bytes[taken..];
                    if *left == 0 {
                        self.place = Place::NEXT;
                    }
                }
                Place::Foreign => return has_data,
            }
        }
        has_data
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use rand::rngs::SmallRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    /// A byte of data that nothing else has.
    const SECRET: u8 = 0xd5;

    /// What a client sends, in parts, with nothing to read after each.
    struct Parts {
        parts: VecDeque<Vec<u8>>,
        is_quiet: bool,
    }

    impl AsyncRead for Parts {
        fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            let this = self.get_mut();
            if std::mem::take(&mut this.is_quiet) {
                return Poll::Pending;
            }
            let Some(part) = this.parts.front_mut() else { return Poll::Pending };
            let taken = part.len().min(buf.remaining());
            buf.put_slice(&part[..taken]);
            part.drain(..taken);
            if part.is_empty() {
                this.parts.pop_front();
                this.is_quiet = true;
            }
            Poll::Ready(Ok(()))
        }
    }

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
    }

    /// Frames as h2 cuts them, without those that it ignores.
    fn known_frames(bytes: &[u8]) -> Vec<u8> {
        let (preface, mut bytes) = bytes.split_at(PREFACE.len());
        let mut known = preface.to_vec();
        let mut is_amid_header = false;
        while bytes.len() >= HEAD_BYTES {
            let length = u32::from_be_bytes([0, bytes[0], bytes[1], bytes[2]]) as usize;
            let (frame, rest) = bytes.split_at((HEAD_BYTES + length).min(bytes.len()));
            match frame[3] {
                EXPERIMENTAL => assert!(!is_amid_header, "a header is cut in two"),
                kind => {
                    known.extend(frame);
                    if kind == HEADERS || kind == CONTINUATION {
                        is_amid_header = frame[4] & END_HEADERS == 0;
                    }
                }
            }
            bytes = rest;
        }
        known.extend(bytes);
        known
    }

    #[test]
    fn a_reader_gets_what_was_sent_and_its_buffer_keeps_no_data() {
        let data = |bytes| frame(DATA, 0, &vec![SECRET; bytes]);
        let sent = [
            PREFACE.to_vec(),
            frame(4, 0, &[0; 18]),
            frame(HEADERS, END_HEADERS, &[7; 40]),
            data(2100),
            frame(HEADERS, 0, &[7; 40]),
            frame(CONTINUATION, 0, &[7; 30]),
            frame(CONTINUATION, END_HEADERS, &[7; 20]),
            data(1),
            frame(6, 1, &[0; 8]),
            data(0),
            data(PAYLOAD_BYTES_MAX),
            frame(8, 0, &[0; 4]),
            data(300),
            data(9),
        ]
        .concat();
        let mut overwritten = 0;
        for seed in 0..400 {
            let mut rng = SmallRng::seed_from_u64(seed);
            let mut parts = VecDeque::new();
            let mut rest = sent.as_slice();
            let largest = [3, 40, 3000, 60_000][seed as usize % 4];
            while !rest.is_empty() {
                let (part, after) = rest.split_at(rng.random_range(1..=largest).min(rest.len()));
                parts.push_back(part.to_vec());
                rest = after;
            }
            // As h2's: it goes on behind what was read, and begins anew when it is full.
            let mut buffer = vec![0; rng.random_range(10..=50_000)];
            let (mut at, mut got) = (0, Vec::new());
            let mut reader = Overwriting::new(Parts { parts, is_quiet: false });
            let mut cx = Context::from_waker(std::task::Waker::noop());
            loop {
                let mut buf = ReadBuf::new(&mut buffer[at..]);
                if Pin::new(&mut reader).poll_read(&mut cx, &mut buf).is_ready() {
                    assert!(!buf.filled().is_empty(), "seed {seed}: read as the end");
                    got.extend(buf.filled());
                    at = (at + buf.filled().len()) % buffer.len();
                    continue;
                }
                if reader.frames.are_whole() {
                    assert!(!buffer.contains(&SECRET), "seed {seed}: {at} of {}", buffer.len());
                    overwritten += 1;
                }
                if reader.io.parts.is_empty() {
                    break;
                }
            }
            assert!(known_frames(&got) == sent, "seed {seed}");
        }
        assert!(overwritten > 300, "{overwritten}");
    }

    #[test]
    fn what_is_not_http_2_is_left_alone() {
        let sent = b"GET /metrics HTTP/1.1\r\n\r\n".to_vec();
        let mut reader = Overwriting::new(Parts { parts: [sent.clone()].into(), is_quiet: false });
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let mut bytes = [0; 64];
        let mut buf = ReadBuf::new(&mut bytes);
        assert!(Pin::new(&mut reader).poll_read(&mut cx, &mut buf).is_ready());
        assert_eq!(buf.filled(), sent);
        assert!(Pin::new(&mut reader).poll_read(&mut cx, &mut buf).is_pending());
    }
}
