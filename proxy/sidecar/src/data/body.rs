//! The one body type: what hyper received, passed on frame by frame, never collected.

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

/// What a body fails with. hyper looks into its sources for the reset's code, so that a reset keeps its reason.
pub(crate) type BodyError = Box<dyn StdError + Send + Sync>;

/// No frame came within the idle time-out.
#[derive(Debug, thiserror::Error)]
#[error("no data for {0:?}")]
struct BodyIdle(Duration);

/// A request's or a response's body.
pub(crate) struct Body {
    source: Rc<Source>,
    idle: Option<Idle>,
    trailers: Option<fn(&mut HeaderMap)>,
    /// Freed when the body has gone: the stream's place in its connection, the balancer's count, a drain's token.
    held: Option<Box<dyn Any>>,
}

struct Source {
    inner: RefCell<Inner>,
    touched: Cell<bool>,
    ended: Cell<Option<Instant>>,
}

enum Inner {
    Empty,
    Full(Bytes),
    Incoming(Incoming),
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

    pub(crate) fn incoming(incoming: Incoming) -> Self {
        Self::new(Inner::Incoming(incoming))
    }

    fn new(inner: Inner) -> Self {
        let complete = match &inner {
            Inner::Empty => true,
            Inner::Full(_) => false,
            Inner::Incoming(incoming) => incoming.is_end_stream(),
        };
        let ended = Cell::new(complete.then(Instant::now));
        let source = Source { inner: RefCell::new(inner), touched: Cell::new(false), ended };
        Self { source: Rc::new(source), idle: None, trailers: None, held: None }
    }

    /// Fails when no frame comes for `limit`.
    pub(crate) fn set_idle(&mut self, limit: Option<Duration>) {
        self.idle = limit.map(|limit| Idle { limit, timer: None });
    }

    /// Passes trailers through `edit`, and through nothing else.
    pub(crate) fn edit_trailers(&mut self, edit: fn(&mut HeaderMap)) {
        self.trailers = Some(edit);
    }

    /// Keeps `held` as long as the body.
    pub(crate) fn holding(mut self, held: impl Any) -> Self {
        self.held = Some(Box::new(held));
        self
    }

    /// A second handle on the same body, for a request that may have to be sent again. Only one of the two may be
    /// read, and the second only if the first was not (`untouched`).
    pub(crate) fn again(&self) -> Self {
        let idle = self.idle.as_ref().map(|idle| Idle { limit: idle.limit, timer: None });
        Self { source: self.source.clone(), idle, trailers: self.trailers, held: None }
    }

    /// When the last of it was read; `None`: more is to come.
    pub(crate) fn ended(&self) -> Option<Instant> {
        self.source.ended.get()
    }

    /// No frame has been given out yet.
    pub(crate) fn untouched(&self) -> bool {
        !self.source.touched.get()
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
        let mut inner = this.source.inner.borrow_mut();
        let frame = match &mut *inner {
            Inner::Empty => return Poll::Ready(None),
            Inner::Full(bytes) => {
                let bytes = std::mem::take(bytes);
                *inner = Inner::Empty;
                this.source.touched.set(true);
                return Poll::Ready(Some(Ok(Frame::data(bytes))));
            }
            Inner::Incoming(incoming) => Pin::new(incoming).poll_frame(cx),
        };
        match frame {
            Poll::Ready(Some(Ok(mut frame))) => {
                this.source.touched.set(true);
                if frame.is_trailers()
                    || matches!(&*inner, Inner::Incoming(incoming) if incoming.is_end_stream())
                {
                    this.source.ended.set(Some(Instant::now()));
                }
                if let Some(Idle { timer: Some(timer), limit }) = &mut this.idle {
                    timer.as_mut().reset(Instant::now() + *limit);
                }
                if let (Some(edit), Some(trailers)) = (this.trailers, frame.trailers_mut()) {
                    edit(trailers);
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                this.source.touched.set(true);
                Poll::Ready(Some(Err(error.into())))
            }
            Poll::Ready(None) => {
                this.source.ended.set(Some(Instant::now()));
                Poll::Ready(None)
            }
            Poll::Pending => {
                let Some(Idle { limit, timer }) = &mut this.idle else { return Poll::Pending };
                let limit = *limit;
                let timer = timer.get_or_insert_with(|| Box::pin(sleep(limit)));
                timer.as_mut().poll(cx).map(|()| Some(Err(BodyIdle(limit).into())))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &*self.source.inner.borrow() {
            Inner::Empty => true,
            Inner::Full(_) => false,
            Inner::Incoming(incoming) => incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &*self.source.inner.borrow() {
            Inner::Empty => SizeHint::with_exact(0),
            Inner::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Inner::Incoming(incoming) => incoming.size_hint(),
        }
    }
}
