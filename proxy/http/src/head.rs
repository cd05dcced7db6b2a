//! The head of a request and of a response, for both versions of HTTP.

use crate::fields::{Fields, Span};

/// The version that a message was written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Hash)]
pub enum Version {
    /// HTTP/1.0.
    Http10,
    /// HTTP/1.1.
    #[default]
    Http11,
    /// HTTP/2.
    Http2,
}

/// A request without its body.
///
/// The parts of the target are as they came, each absent where the request did not have it: origin form has a path
/// only (`*` included), absolute form all three, CONNECT the authority only. In HTTP/2 they are the pseudo-fields.
/// `path` includes the query. All text lives in one buffer, that of [`fields`](Self::fields).
#[derive(Debug, Clone, Default)]
pub struct RequestHead {
    /// What it was written in.
    pub version: Version,
    /// The field lines; `host` is among them, pseudo-fields are not.
    pub fields: Fields,
    pub(crate) method: Span,
    pub(crate) scheme: Option<Span>,
    pub(crate) authority: Option<Span>,
    pub(crate) path: Option<Span>,
    protocol: Option<Span>,
}

impl RequestHead {
    /// Forgets everything and keeps the memory.
    pub fn clear(&mut self) {
        let Self { version, fields, method, scheme, authority, path, protocol } = self;
        *version = Version::default();
        fields.clear();
        *method = Span::default();
        (*scheme, *authority, *path, *protocol) = (None, None, None, None);
    }

    /// The method, as it was written.
    pub fn method(&self) -> &[u8] {
        self.fields.text(self.method)
    }

    /// `http` or `https`, if the target names it.
    pub fn scheme(&self) -> Option<&[u8]> {
        self.scheme.map(|span| self.fields.text(span))
    }

    /// The authority of the target, or `:authority`.
    pub fn authority(&self) -> Option<&[u8]> {
        self.authority.map(|span| self.fields.text(span))
    }

    /// The path and the query.
    pub fn path(&self) -> Option<&[u8]> {
        self.path.map(|span| self.fields.text(span))
    }

    /// `:protocol` of an extended CONNECT (RFC 8441).
    pub fn protocol(&self) -> Option<&[u8]> {
        self.protocol.map(|span| self.fields.text(span))
    }

    /// Replaces the method.
    pub fn set_method(&mut self, method: &[u8]) {
        self.method = self.fields.store(method);
    }

    /// Replaces the scheme.
    pub fn set_scheme(&mut self, scheme: Option<&[u8]>) {
        self.scheme = scheme.map(|text| self.fields.store(text));
    }

    /// Replaces the authority.
    pub fn set_authority(&mut self, authority: Option<&[u8]>) {
        self.authority = authority.map(|text| self.fields.store(text));
    }

    /// Replaces the path and the query.
    pub fn set_path(&mut self, path: Option<&[u8]>) {
        self.path = path.map(|text| self.fields.store(text));
    }

    /// Replaces the protocol of an extended CONNECT.
    pub fn set_protocol(&mut self, protocol: Option<&[u8]>) {
        self.protocol = protocol.map(|text| self.fields.store(text));
    }
}

/// A response without its body.
#[derive(Debug, Clone, Default)]
pub struct ResponseHead {
    /// What it was written in.
    pub version: Version,
    /// 100 to 999.
    pub status: u16,
    /// The field lines; pseudo-fields are not among them.
    pub fields: Fields,
    pub(crate) reason: Option<Span>,
}

impl ResponseHead {
    /// Forgets everything and keeps the memory.
    pub fn clear(&mut self) {
        let Self { version, status, fields, reason } = self;
        *version = Version::default();
        *status = 0;
        fields.clear();
        *reason = None;
    }

    /// The reason phrase of HTTP/1.x; `None` where there was no room for one (HTTP/2).
    pub fn reason(&self) -> Option<&[u8]> {
        self.reason.map(|span| self.fields.text(span))
    }

    /// Replaces the reason phrase.
    pub fn set_reason(&mut self, reason: Option<&[u8]>) {
        self.reason = reason.map(|text| self.fields.store(text));
    }

    /// 1xx: another head follows.
    pub fn is_interim(&self) -> bool {
        (100..200).contains(&self.status)
    }
}
