//! The one body type: what hyper received, passed on frame by frame, never collected.
//!
//! A request's body remembers its first frames, so that a request which its peer has provably not looked at (a stream
//! that a GOAWAY left out) can go to another with its body. What is remembered is bounded, and forgotten when an
//! answer comes.

use std::{
    any::Any,
    cell::{Cell, RefCell},
    error::Error as StdError,
    future::Future,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep, sleep};

use super::record::Recorder;

/// Bytes of a request's body that are remembered: enough for most calls, and little beside a stream's window.
const MAX_REMEMBERED: usize = 64 * 1024;

/// What a body fails with. hyper looks into its sources for the reset's code, so that a reset keeps its reason.
pub(crate) type BodyError = Box<dyn StdError + Send + Sync>;

#[derive(Debug, thiserror::Error)]
enum Failed {
    /// No frame came within the idle time-out.
    #[error("no data for {0:?}")]
    Idle(Duration),
    /// The peer reset the stream with `CANCEL` or `NO_ERROR`, which hyper takes for its end.
    #[error("the body was cut off")]
    CutOff(#[source] h2::Error),
    /// Another handle reads the body now.
    #[error("the request was sent again")]
    Superseded,
}

/// A request's or a response's body.
pub(crate) struct Body {
    source: Rc<Source>,
    /// Frames read through this handle, as far as they are remembered.
    position: usize,
    /// Set with the first read.
    reader: Option<u32>,
    idle: Option<Idle>,
    trailers: Option<fn(&mut HeaderMap)>,
    /// Shown the trailers that are passed on.
    recorder: Option<Recorder>,
    /// Freed when the body has gone: the stream's place in its connection, the balancer's count, a drain's token.
    held: Option<Box<dyn Any>>,
}

struct Source {
    inner: RefCell<Inner>,
    ended: Cell<Option<Instant>>,
    /// Reading failed.
    failed: Cell<bool>,
    /// What was read so far; `None`: too much, or no longer of use.
    remembered: RefCell<Option<Remembered>>,
    /// The handle that reads; a later one takes over.
    reader: Cell<u32>,
}

#[derive(Default)]
struct Remembered {
    frames: Vec<Remember>,
    bytes: usize,
}

enum Remember {
    Data(Bytes),
    Trailers(HeaderMap),
}

enum Inner {
    Empty,
    Full(Bytes),
    Http1(Incoming),
    Http2(Incoming),
}

struct Idle {
    limit: Duration,
    // Made at the first wait: most bodies never wait.
    timer: Option<Pin<Box<Sleep>>>,
}

impl Body {
    pub(crate) fn empty() -> Self {
        Self::new(Inner::Empty)
    }

    pub(crate) fn full(bytes: impl Into<Bytes>) -> Self {
        Self::new(Inner::Full(bytes.into()))
    }

    /// What came with a message of this version.
    pub(crate) fn incoming(incoming: Incoming, version: http::Version) -> Self {
        Self::new(if version == http::Version::HTTP_2 {
            Inner::Http2(incoming)
        } else {
            Inner::Http1(incoming)
        })
    }

    fn new(inner: Inner) -> Self {
        let ended = Cell::new(inner.is_end_stream().then(Instant::now));
        let source = Source {
            inner: RefCell::new(inner),
            ended,
            failed: Cell::new(false),
            remembered: RefCell::new(None),
            reader: Cell::new(0),
        };
        Self {
            source: Rc::new(source),
            position: 0,
            reader: None,
            idle: None,
            trailers: None,
            recorder: None,
            held: None,
        }
    }

    /// Fails when no frame comes for `limit`.
    pub(crate) fn set_idle(&mut self, limit: Option<Duration>) {
        self.idle = limit.map(|limit| Idle { limit, timer: None });
    }

    /// Passes trailers through `edit`, and through nothing else.
    pub(crate) fn edit_trailers(&mut self, edit: fn(&mut HeaderMap)) {
        self.trailers = Some(edit);
    }

    /// Has `recorder` record when the body ends, with its trailers.
    pub(crate) fn recorded(mut self, recorder: Recorder) -> Self {
        self.recorder = Some(recorder);
        self
    }

    /// Keeps `held` as long as the body.
    pub(crate) fn holding(mut self, held: impl Any) -> Self {
        self.held = Some(Box::new(held));
        self
    }

    /// Remembers what is read from now on, so that the body can be sent again.
    pub(crate) fn remember(&self) {
        *self.source.remembered.borrow_mut() = Some(Remembered::default());
    }

    /// Ends [`remember`](Self::remember).
    pub(crate) fn forget(&self) {
        *self.source.remembered.borrow_mut() = None;
    }

    /// A handle that reads the body from its beginning. It takes the body away from handles that read before; it
    /// serves only while the body is [`repeatable`](Self::is_repeatable).
    pub(crate) fn again(&self) -> Self {
        let idle = self.idle.as_ref().map(|idle| Idle { limit: idle.limit, timer: None });
        let source = self.source.clone();
        Self { source, position: 0, reader: None, idle, trailers: self.trailers, recorder: None, held: None }
    }

    /// Whether everything that was read is remembered.
    pub(crate) fn is_repeatable(&self) -> bool {
        self.source.remembered.borrow().is_some()
    }

    /// When the last of it was read; `None`: more is to come.
    pub(crate) fn ended(&self) -> Option<Instant> {
        self.source.ended.get()
    }

    /// Whether it could not be read to its end: its sender broke off, was silent for too long, or framed it wrongly.
    pub(crate) fn has_failed(&self) -> bool {
        self.source.failed.get()
    }

    fn is_at_the_front(&self) -> bool {
        self.source.remembered.borrow().as_ref().is_none_or(|r| self.position == r.frames.len())
    }
}

impl Source {
    /// Remembers a frame that was read, if there is room.
    fn note(&self, frame: &Frame<Bytes>) {
        let mut remembered = self.remembered.borrow_mut();
        let Some(memory) = &mut *remembered else { return };
        if let Some(data) = frame.data_ref() {
            memory.bytes += data.len();
            memory.frames.push(Remember::Data(data.clone()));
        } else if let Some(trailers) = frame.trailers_ref() {
            memory.frames.push(Remember::Trailers(trailers.clone()));
        }
        if memory.bytes > MAX_REMEMBERED {
            *remembered = None;
        }
    }

    fn recall(&self, position: usize) -> Option<Frame<Bytes>> {
        let remembered = self.remembered.borrow();
        Some(match remembered.as_ref()?.frames.get(position)? {
            Remember::Data(bytes) => Frame::data(bytes.clone()),
            Remember::Trailers(trailers) => Frame::trailers(trailers.clone()),
        })
    }
}

impl Inner {
    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Full(_) => false,
            Self::Http1(incoming) | Self::Http2(incoming) => incoming.is_end_stream(),
        }
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self {
            Self::Empty => Poll::Ready(None),
            Self::Full(bytes) => {
                let bytes = std::mem::take(bytes);
                *self = Self::Empty;
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
            Self::Http1(incoming) => Pin::new(incoming).poll_frame(cx).map_err(Into::into),
            Self::Http2(incoming) => match Pin::new(&mut *incoming).poll_frame(cx) {
                Poll::Ready(None) if !incoming.is_end_stream() => {
                    Poll::Ready(Some(Err(Failed::CutOff(h2::Reason::CANCEL.into()).into())))
                }
                frame => frame.map_err(Into::into),
            },
        }
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        let source = this.source.clone();
        let reader = *this.reader.get_or_insert_with(|| {
            source.reader.set(source.reader.get() + 1);
            source.reader.get()
        });
        if reader != source.reader.get() {
            return Poll::Ready(Some(Err(Failed::Superseded.into())));
        }
        if let Some(frame) = source.recall(this.position) {
            this.position += 1;
            return Poll::Ready(Some(Ok(frame)));
        }
        let mut inner = source.inner.borrow_mut();
        match inner.poll_frame(cx) {
            Poll::Ready(Some(Ok(mut frame))) => {
                if let (Some(edit), Some(trailers)) = (this.trailers, frame.trailers_mut()) {
                    edit(trailers);
                }
                if let (Some(recorder), Some(trailers)) = (&mut this.recorder, frame.trailers_ref()) {
                    recorder.trailers(trailers);
                }
                source.note(&frame);
                this.position += 1;
                if frame.is_trailers() || inner.is_end_stream() {
                    source.ended.set(Some(Instant::now()));
                }
                if let Some(Idle { timer: Some(timer), limit }) = &mut this.idle {
                    timer.as_mut().reset(Instant::now() + *limit);
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(None) => {
                source.ended.set(Some(Instant::now()));
                Poll::Ready(None)
            }
            Poll::Ready(error) => {
                source.failed.set(true);
                // What is lost cannot be sent again.
                this.forget();
                Poll::Ready(error)
            }
            Poll::Pending => {
                let Some(Idle { limit, timer }) = &mut this.idle else { return Poll::Pending };
                let limit = *limit;
                let timer = timer.get_or_insert_with(|| Box::pin(sleep(limit)));
                timer.as_mut().poll(cx).map(|()| {
                    source.failed.set(true);
                    Some(Err(Failed::Idle(limit).into()))
                })
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.is_at_the_front() && self.source.inner.borrow().is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        if !self.is_at_the_front() {
            return SizeHint::default();
        }
        match &*self.source.inner.borrow() {
            Inner::Empty => SizeHint::with_exact(0),
            Inner::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            // hyper would give a message without a body the `content-length: 0` that its sender did not write.
            Inner::Http1(incoming) | Inner::Http2(incoming) if incoming.is_end_stream() => {
                SizeHint::default()
            }
            Inner::Http1(incoming) | Inner::Http2(incoming) => incoming.size_hint(),
        }
    }
}
