//! Keeps no read data in the read buffers of HTTP/2 and TLS.
//!
//! Libraries read into buffers of their own and reuse them, so the bytes that came last stay there until
//! more bytes come, which may never happen. But a reader offers its buffer to the stream that it reads from,
//! and the stream may write to the whole offered part, not only the bytes that it returns. So, whenever there
//! is nothing more to read:
//!
//! - rustls decrypts in place, and starts at the beginning of its buffer with every read:
//!   [`super::graceful_close`] below it zeroes the offered part.
//! - h2 continues behind the bytes that it has read, and starts at the beginning only when its buffer is full.
//!   So [`ClearedReads`] fills the rest of the buffer with a frame of zeros that ends where the buffer does.
//!   The frame has an unknown type, and frames of unknown types must be ignored (RFC 9113, 4.1 and 5.5). Then
//!   h2 offers its buffer from the beginning, which is zeroed; or a new buffer, if a call still holds parts of
//!   this one: the allocator zeroes this one when the call releases it.
//!
//! Not covered: the bytes of an incomplete frame, until the rest of it has come.
//! Knows where HTTP/2 frames begin. Does not know what is in them.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What every HTTP/2 client sends first.
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Length, type, flags and stream of a frame.
const FRAME_HEADER_BYTES: usize = 9;
/// The largest payload of a frame, unless the peers agree on another.
const PAYLOAD_BYTES_MAX: usize = 1 << 14;
/// Types of frames; the last is one that HTTP/2 does not define.
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const UNKNOWN_TYPE: u8 = 0xff;
/// The flag of the last frame of a header block.
const END_HEADERS: u8 = 4;

/// A connection for an HTTP/2 reader that is to keep none of the bytes that it has read.
pub(super) struct ClearedReads<I> {
    io: I,
    frames: FrameTracker,
    /// Where the reader's buffer may still hold data of the client.
    residue: Residue,
}

enum Residue {
    Nothing,
    /// BeforeNextRead what it offers.
    BeforeNextRead,
    /// The same; a frame of zeros is being returned.
    Filling(ZeroFrame),
    /// In the part that it offers next.
    InNextRead,
}

impl<I> ClearedReads<I> {
    pub(super) fn new(io: I) -> Self {
        Self { io, frames: FrameTracker::new(), residue: Residue::Nothing }
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for ClearedReads<I> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !matches!(this.residue, Residue::Filling(_)) {
            let before = buf.filled().len();
            if let Poll::Ready(read) = Pin::new(&mut this.io).poll_read(cx, buf) {
                if this.frames.read(&buf.filled()[before..]) {
                    this.residue = Residue::BeforeNextRead;
                }
                return Poll::Ready(read);
            }
            match this.residue {
                Residue::BeforeNextRead if this.frames.at_boundary() && buf.remaining() > 0 => {
                    this.residue = Residue::Filling(ZeroFrame::new(buf.remaining()));
                }
                Residue::InNextRead => {
                    buf.initialize_unfilled().fill(0);
                    this.residue = Residue::Nothing;
                    return Poll::Pending;
                }
                _ => return Poll::Pending,
            }
        }
        if let Residue::Filling(frame_of_zeros) = &mut this.residue {
            frame_of_zeros.put(buf);
            if frame_of_zeros.left() == 0 {
                // If the rest of the buffer is longer than a frame can be, another frame follows.
                this.residue = if frame_of_zeros.fills_less { Residue::BeforeNextRead } else { Residue::InNextRead };
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for ClearedReads<I> {
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

/// A frame of zeros that is being written to a buffer.
struct ZeroFrame {
    head: [u8; FRAME_HEADER_BYTES],
    bytes: usize,
    put: usize,
    fills_less: bool,
}

impl ZeroFrame {
    /// A frame of `room` bytes, or of the nearest length that a frame can have.
    fn new(room: usize) -> Self {
        let payload = room.saturating_sub(FRAME_HEADER_BYTES).min(PAYLOAD_BYTES_MAX);
        let bytes = FRAME_HEADER_BYTES + payload;
        let mut head = [0; FRAME_HEADER_BYTES];
        let length = u32::try_from(payload).unwrap_or(0).to_be_bytes();
        head[..3].copy_from_slice(&length[1..]);
        head[3] = UNKNOWN_TYPE;
        Self { head, bytes, put: 0, fills_less: bytes < room }
    }

    fn left(&self) -> usize {
        self.bytes - self.put
    }

    fn put(&mut self, buf: &mut ReadBuf<'_>) {
        let of_head = &self.head[self.put.min(FRAME_HEADER_BYTES)..];
        let of_head = &of_head[..of_head.len().min(buf.remaining())];
        buf.put_slice(of_head);
        let zeros = (self.left() - of_head.len()).min(buf.remaining());
        buf.initialize_unfilled_to(zeros).fill(0);
        buf.advance(zeros);
        self.put += of_head.len() + zeros;
    }
}

/// Follows the frames that a client sends.
struct FrameTracker {
    position: Position,
    /// A header block is incomplete, and only its continuation may follow.
    in_header_block: bool,
}

enum Position {
    /// This many bytes of the preface have come.
    Preface(usize),
    /// This many bytes of a frame's header have come.
    Header([u8; FRAME_HEADER_BYTES], usize),
    /// This many bytes of a frame's payload are missing; whether they are data.
    Payload(usize, bool),
    /// This is not HTTP/2.
    NotHttp2,
}

impl Position {
    const NEXT: Self = Self::Header([0; FRAME_HEADER_BYTES], 0);
}

impl FrameTracker {
    fn new() -> Self {
        Self { position: Position::Preface(0), in_header_block: false }
    }

    /// Whether a frame of any type may come next.
    fn at_boundary(&self) -> bool {
        matches!(self.position, Position::Header(_, 0)) && !self.in_header_block
    }

    /// Follows `bytes`. Returns whether there is data among them.
    fn read(&mut self, mut bytes: &[u8]) -> bool {
        let mut has_data = false;
        while !bytes.is_empty() {
            match &mut self.position {
                Position::Preface(come) => {
                    let wanted = &PREFACE[*come..];
                    let taken = wanted.len().min(bytes.len());
                    *come += taken;
                    if bytes[..taken] != wanted[..taken] {
                        self.position = Position::NotHttp2;
                    } else if *come == PREFACE.len() {
                        self.position = Position::NEXT;
                    }
                    bytes = &bytes[taken..];
                }
                Position::Header(head, come) => {
                    let taken = (FRAME_HEADER_BYTES - *come).min(bytes.len());
                    head[*come..*come + taken].copy_from_slice(&bytes[..taken]);
                    *come += taken;
                    bytes = &bytes[taken..];
                    if *come == FRAME_HEADER_BYTES {
                        let [a, b, c, kind, flags, ..] = *head;
                        if matches!(kind, HEADERS | CONTINUATION) {
                            self.in_header_block = flags & END_HEADERS == 0;
                        }
                        self.position = match u32::from_be_bytes([0, a, b, c]) as usize {
                            0 => Position::NEXT,
                            payload => Position::Payload(payload, kind == DATA),
                        };
                    }
                }
                Position::Payload(left, is_data) => {
                    has_data |= *is_data;
                    let taken = (*left).min(bytes.len());
                    *left -= taken;
                    bytes = &bytes[taken..];
                    if *left == 0 {
                        self.position = Position::NEXT;
                    }
                }
                Position::NotHttp2 => return has_data,
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

    /// A byte that occurs in data only.
    const SECRET: u8 = 0xd5;

    /// What a client sends, in parts, with nothing to read after each part.
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

    /// FrameTracker as h2 cuts them, without those that it ignores.
    fn known_frames(bytes: &[u8]) -> Vec<u8> {
        let (preface, mut bytes) = bytes.split_at(PREFACE.len());
        let mut known = preface.to_vec();
        let mut in_header_block = false;
        while bytes.len() >= FRAME_HEADER_BYTES {
            let length = u32::from_be_bytes([0, bytes[0], bytes[1], bytes[2]]) as usize;
            let (frame, rest) = bytes.split_at((FRAME_HEADER_BYTES + length).min(bytes.len()));
            match frame[3] {
                UNKNOWN_TYPE => assert!(!in_header_block, "a header is cut in two"),
                kind => {
                    known.extend(frame);
                    if kind == HEADERS || kind == CONTINUATION {
                        in_header_block = frame[4] & END_HEADERS == 0;
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
            // Like h2's: reads continue behind the bytes read, and start at the beginning when it is full.
            let mut buffer = vec![0; rng.random_range(10..=50_000)];
            let (mut at, mut got) = (0, Vec::new());
            let mut reader = ClearedReads::new(Parts { parts, is_quiet: false });
            let mut cx = Context::from_waker(std::task::Waker::noop());
            loop {
                let mut buf = ReadBuf::new(&mut buffer[at..]);
                if Pin::new(&mut reader).poll_read(&mut cx, &mut buf).is_ready() {
                    assert!(!buf.filled().is_empty(), "seed {seed}: read as the end");
                    got.extend(buf.filled());
                    at = (at + buf.filled().len()) % buffer.len();
                    continue;
                }
                if reader.frames.at_boundary() {
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
    fn bytes_that_are_not_http_2_are_left_alone() {
        let sent = b"GET /metrics HTTP/1.1\r\n\r\n".to_vec();
        let mut reader = ClearedReads::new(Parts { parts: [sent.clone()].into(), is_quiet: false });
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let mut bytes = [0; 64];
        let mut buf = ReadBuf::new(&mut bytes);
        assert!(Pin::new(&mut reader).poll_read(&mut cx, &mut buf).is_ready());
        assert_eq!(buf.filled(), sent);
        assert!(Pin::new(&mut reader).poll_read(&mut cx, &mut buf).is_pending());
    }
}
