//! A request's head as `outrigger_core` sees it.

use outrigger_core::request::View;
use outrigger_http::head::RequestHead;

/// See [`View`].
pub(crate) struct Seen<'a>(pub(crate) &'a RequestHead);

impl View for Seen<'_> {
    fn method(&self) -> &[u8] {
        self.0.method()
    }

    fn authority(&self) -> Option<&[u8]> {
        self.0.authority()
    }

    fn target(&self) -> &[u8] {
        self.0.path().unwrap_or_default()
    }

    fn values<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a [u8]> {
        self.0.fields.get_all(name)
    }
}
