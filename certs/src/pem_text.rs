//! PEM in and out, for certificates. Inputs are bounded before they are parsed: a PEM file may be anyone's.

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::{self, PemObject};

/// Enough for the bound on roots with 4 KiB each in base64, and far below what would hurt.
pub(crate) const MAX_PEM_BYTES: usize = 256 * 1024;

/// Every certificate of `text`, in order; other sections are skipped.
pub(crate) fn certificates(text: &[u8]) -> Result<Vec<CertificateDer<'static>>, pem::Error> {
    CertificateDer::pem_slice_iter(text).collect()
}

pub(crate) fn encode(certificates: &[CertificateDer<'_>]) -> String {
    let config = ::pem::EncodeConfig::new().set_line_ending(::pem::LineEnding::LF);
    certificates
        .iter()
        .map(|der| ::pem::encode_config(&::pem::Pem::new("CERTIFICATE", der.to_vec()), config))
        .collect()
}
