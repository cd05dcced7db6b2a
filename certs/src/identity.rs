//! SPIFFE identities: `spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>`.
//!
//! The parser accepts exactly one spelling of each identity, so that two identities are equal if and only if their
//! text is: no percent encoding, no upper case, no empty segment, no trailing slash. The three parts are held to what
//! can occur: the trust domain to a lower-case DNS name, the namespace to an RFC 1123 label and the service account to
//! an RFC 1123 subdomain, which are Kubernetes' own rules for those names (SPIFFE-ID, sections 2.1 to 2.3, allows more).

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

const SCHEME: &str = "spiffe://";
/// Characters in one DNS label (RFC 1035, section 2.3.4).
const MAX_LABEL: usize = 63;
/// Characters in a DNS name (RFC 1035, section 2.3.4, as text without the final dot).
const MAX_NAME: usize = 253;
/// The controller's service account, in the mesh's namespace.
const CONTROLLER: &str = "outrigger-controller";

/// Why a text is not an identity. It never repeats the text, which may be a peer's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// Not of the form `spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>`.
    #[error("not of the form spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>")]
    Form,
    /// The trust domain is not a lower-case DNS name of at most 253 characters.
    #[error("the trust domain must be a lower-case DNS name of at most 253 characters")]
    TrustDomain,
    /// The namespace is not a lower-case DNS label of at most 63 characters.
    #[error("the namespace must be a lower-case DNS label of at most 63 characters")]
    Namespace,
    /// The service account is not a lower-case DNS name of at most 253 characters.
    #[error("the service account must be a lower-case DNS name of at most 253 characters")]
    ServiceAccount,
}

/// The name under which one set of roots vouches for identities, e.g. `outrigger.local`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// The trust domain as text, without a scheme.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TrustDomain {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        if is_dns_name(text) { Ok(Self(text.into())) } else { Err(IdentityError::TrustDomain) }
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The identity of a workload. Cheap to clone; equal exactly when the text is.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    text: Arc<str>,
    // Where the trust domain ends, and the namespace: both follow from `text`, so the derived comparisons are right.
    trust_domain_end: u16,
    namespace_end: u16,
}

impl SpiffeId {
    /// The identity of a service account in a namespace.
    pub fn new(
        trust_domain: &TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, IdentityError> {
        format!("{SCHEME}{trust_domain}/ns/{namespace}/sa/{service_account}").parse()
    }

    /// The controller's identity: service account `outrigger-controller` in the mesh's own namespace (by default
    /// `outrigger-system`). A workload must never be given it.
    pub fn controller(trust_domain: &TrustDomain, mesh_namespace: &str) -> Result<Self, IdentityError> {
        Self::new(trust_domain, mesh_namespace, CONTROLLER)
    }

    /// The whole identity, `spiffe://...`.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The trust domain, e.g. `outrigger.local`.
    pub fn trust_domain(&self) -> &str {
        &self.text[SCHEME.len()..usize::from(self.trust_domain_end)]
    }

    /// The namespace, e.g. `shop`.
    pub fn namespace(&self) -> &str {
        &self.text[usize::from(self.trust_domain_end) + "/ns/".len()..usize::from(self.namespace_end)]
    }

    /// The service account, e.g. `orders`.
    pub fn service_account(&self) -> &str {
        &self.text[usize::from(self.namespace_end) + "/sa/".len()..]
    }
}

impl FromStr for SpiffeId {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let rest = text.strip_prefix(SCHEME).ok_or(IdentityError::Form)?;
        let mut segments = rest.split('/');
        let mut next = || segments.next().ok_or(IdentityError::Form);
        let (trust_domain, ns, namespace, sa, service_account) =
            (next()?, next()?, next()?, next()?, next()?);
        if ns != "ns" || sa != "sa" || segments.next().is_some() {
            return Err(IdentityError::Form);
        }
        if !is_dns_name(trust_domain) {
            return Err(IdentityError::TrustDomain);
        }
        if !is_label(namespace) {
            return Err(IdentityError::Namespace);
        }
        if !is_dns_name(service_account) {
            return Err(IdentityError::ServiceAccount);
        }
        let trust_domain_end = SCHEME.len() + trust_domain.len();
        let namespace_end = trust_domain_end + "/ns/".len() + namespace.len();
        // The parts are bounded above to 9 + 253 + 4 + 63 characters.
        let offset = |end: usize| u16::try_from(end).map_err(|_| IdentityError::Form);
        Ok(Self {
            text: text.into(),
            trust_domain_end: offset(trust_domain_end)?,
            namespace_end: offset(namespace_end)?,
        })
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

fn is_dns_name(text: &str) -> bool {
    text.len() <= MAX_NAME && text.split('.').all(is_label)
}

fn is_label(label: &str) -> bool {
    let alphanumeric = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = label.as_bytes();
    bytes.len() <= MAX_LABEL
        && bytes.first().is_some_and(alphanumeric)
        && bytes.last().is_some_and(alphanumeric)
        && bytes.iter().all(|byte| alphanumeric(byte) || *byte == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn parts_are_told_apart() {
        let id: SpiffeId = "spiffe://outrigger.local/ns/shop/sa/orders.v2".parse().unwrap();
        assert_eq!(
            (id.trust_domain(), id.namespace(), id.service_account()),
            ("outrigger.local", "shop", "orders.v2")
        );
        let domain: TrustDomain = "outrigger.local".parse().unwrap();
        assert_eq!(
            SpiffeId::controller(&domain, "outrigger-system").unwrap().as_str(),
            "spiffe://outrigger.local/ns/outrigger-system/sa/outrigger-controller"
        );
    }

    #[test]
    fn every_other_spelling_is_refused() {
        let long = "a".repeat(3 * 1024);
        let label = "a".repeat(64);
        for text in [
            "",
            "spiffe://",
            "spiffe://a",
            "spiffe://a/",
            "spiffe://a/ns/b/sa",
            "spiffe://a/ns/b/sa/",
            "spiffe://a/ns/b/sa/c/",
            "spiffe://a/ns/b/sa/c/d",
            "spiffe://a/ns//sa/c",
            "spiffe:///ns/b/sa/c",
            "spiffe://a//ns/b/sa/c",
            "spiffe://a/sa/b/ns/c",
            "SPIFFE://a/ns/b/sa/c",
            "Spiffe://a/ns/b/sa/c",
            "https://a/ns/b/sa/c",
            "spiffe:/a/ns/b/sa/c",
            " spiffe://a/ns/b/sa/c",
            "spiffe://a/ns/b/sa/c ",
            "spiffe://a/ns/b/sa/c\n",
            "spiffe://a/ns/b/sa/c\0",
            "spiffe://A/ns/b/sa/c",
            "spiffe://a/ns/B/sa/c",
            "spiffe://a/ns/b/sa/C",
            "spiffe://a/NS/b/sa/c",
            "spiffe://a/ns/b/sa/c%2fd",
            "spiffe://a/ns/b%2Fsa%2Fc/sa/c",
            "spiffe://a/ns/b/sa/..",
            "spiffe://a/ns/../sa/c",
            "spiffe://a/ns/b.c/sa/c",
            "spiffe://a/ns/b/sa/c?x=y",
            "spiffe://a/ns/b/sa/c#d",
            "spiffe://a:443/ns/b/sa/c",
            "spiffe://user@a/ns/b/sa/c",
            "spiffe://a./ns/b/sa/c",
            "spiffe://.a/ns/b/sa/c",
            "spiffe://-a/ns/b/sa/c",
            "spiffe://a/ns/b-/sa/c",
            "spiffe://a/ns/b_c/sa/c",
            "spiffe://ä/ns/b/sa/c",
            "spiffe://a/ns/b/sa/c\u{200b}",
            &format!("spiffe://a/ns/b/sa/{long}"),
            &format!("spiffe://a/ns/{label}/sa/c"),
            &format!("spiffe://{label}/ns/b/sa/c"),
            &format!("spiffe://{}/ns/b/sa/c", ["a"; 128].join(".")),
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text}");
        }
    }

    #[test]
    fn errors_do_not_repeat_a_peers_text() {
        let error = "spiffe://evil\r\ninjected/ns/b/sa/c".parse::<SpiffeId>().unwrap_err();
        assert!(!error.to_string().contains("evil"));
    }

    const LABEL: &str = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?";

    proptest! {
        #[test]
        fn what_is_made_reads_back(
            domain in proptest::collection::vec(LABEL, 1..4),
            namespace in LABEL,
            account in proptest::collection::vec(LABEL, 1..4),
        ) {
            let (domain, account) = (domain.join("."), account.join("."));
            let id = SpiffeId::new(&domain.parse().unwrap(), &namespace, &account).unwrap();
            prop_assert_eq!(id.trust_domain(), domain.as_str());
            prop_assert_eq!(id.namespace(), namespace.as_str());
            prop_assert_eq!(id.service_account(), account.as_str());
            prop_assert_eq!(&id.to_string().parse::<SpiffeId>().unwrap(), &id);
        }

        #[test]
        fn what_parses_is_its_own_only_spelling(text in "(spiffe://)?[a-zA-Z0-9./%:_@-]{0,40}(/ns/[a-z.%/-]{0,20})?(/sa/.{0,20})?") {
            if let Ok(id) = text.parse::<SpiffeId>() {
                let domain: TrustDomain = id.trust_domain().parse().unwrap();
                let again = SpiffeId::new(&domain, id.namespace(), id.service_account()).unwrap();
                prop_assert_eq!(again.as_str(), text.as_str());
            }
        }

        #[test]
        fn parsing_never_panics(text in any::<String>(), bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = text.parse::<SpiffeId>();
            let _ = format!("spiffe://{text}").parse::<SpiffeId>();
            let _ = String::from_utf8_lossy(&bytes).parse::<TrustDomain>();
        }
    }
}
