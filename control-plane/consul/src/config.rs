//! How to reach Consul.

use std::{fmt, future::Future, io, net::IpAddr, path::PathBuf, pin::Pin, str::FromStr, sync::Arc};

use crate::Error;

/// Looks up an agent's name. Injected, because every look-up in Outrigger goes through one resolver.
pub type Resolve =
    Arc<dyn Fn(String) -> Pin<Box<dyn Future<Output = io::Result<Vec<IpAddr>>> + Send>> + Send + Sync>;

/// Everything that a [`crate::Client`] needs to know.
#[derive(Clone)]
pub struct ClientConfig {
    /// Agents of the same cluster, in order of preference; at least one. The client stays with one until it fails.
    pub agents: Vec<AgentAddress>,
    /// The ACL token.
    pub token: Token,
    /// Datacenter, namespace and partition of calls that name none.
    pub scope: Scope,
    /// Needed for `https` agents.
    pub tls: Option<Tls>,
    /// Accept instances on loopback and link-local addresses. Off: whoever may register a service could point the
    /// mesh at a host's own ports or at a cloud's metadata server. On: for tests and demos on one host.
    pub allow_local_addresses: bool,
    /// Needed for agents that are neither an IP address nor `localhost`.
    pub resolve: Option<Resolve>,
}

impl ClientConfig {
    /// One or more agents, no token, no TLS.
    pub fn new(agents: Vec<AgentAddress>) -> Self {
        Self {
            agents,
            token: Token::None,
            scope: Scope::default(),
            tls: None,
            allow_local_addresses: false,
            resolve: None,
        }
    }

    pub(crate) fn validate(&self) -> Result<(), Error> {
        if self.agents.is_empty() {
            return Err(Error::Config("no agent address".into()));
        }
        for agent in &self.agents {
            if agent.https && self.tls.is_none() {
                return Err(Error::Config(format!("{agent} needs the tls settings, at least ca_pem")));
            }
            if agent.ip().is_none() && agent.host != "localhost" && self.resolve.is_none() {
                return Err(Error::Config(format!(
                    "{agent} is a name and there is no resolver; use an IP address or localhost"
                )));
            }
        }
        Ok(())
    }
}

impl fmt::Debug for ClientConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientConfig")
            .field("agents", &self.agents)
            .field("token", &self.token)
            .field("scope", &self.scope)
            .field("tls", &self.tls)
            .field("allow_local_addresses", &self.allow_local_addresses)
            .finish_non_exhaustive()
    }
}

/// One agent: `http://host:port`, `https://host:port` or `host:port` (which means `http`). Default port 8500, with
/// `https` 8501.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct AgentAddress {
    pub(crate) https: bool,
    /// Without brackets.
    pub(crate) host: String,
    pub(crate) port: u16,
}

impl AgentAddress {
    pub(crate) fn ip(&self) -> Option<IpAddr> {
        self.host.parse().ok()
    }

    /// `host:port`, as in a `Host` header.
    pub(crate) fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Display for AgentAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", if self.https { "https" } else { "http" }, self.authority())
    }
}

impl FromStr for AgentAddress {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        // The text is not repeated in the error: people put passwords into URLs.
        let refuse =
            |why: &str| Error::Config(format!("agent address: {why}; expected http(s)://host[:port]"));
        let with_scheme = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
        let uri: http::Uri = with_scheme.parse().map_err(|_| refuse("it is not a URL"))?;
        let https = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(refuse("the scheme is neither http nor https")),
        };
        let authority = uri.authority().ok_or_else(|| refuse("there is no host"))?;
        if authority.as_str().contains('@') {
            return Err(refuse("it holds user information; the token has a setting of its own"));
        }
        if uri.path_and_query().is_some_and(|rest| rest.as_str() != "/") {
            return Err(refuse("it has a path or a query"));
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
        let port = authority.port_u16().unwrap_or(if https { 8501 } else { 8500 });
        if host.is_empty() || port == 0 {
            return Err(refuse("host or port is missing"));
        }
        Ok(Self { https, host, port })
    }
}

/// Where the ACL token comes from.
#[derive(Debug, Clone, Default)]
pub enum Token {
    /// No token: what Consul's anonymous token may do.
    #[default]
    None,
    /// A fixed token.
    Value(Secret),
    /// A file with nothing but the token, read again for each call, so that a renewed token counts at once.
    File(PathBuf),
}

/// A string that `Debug` does not show.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    /// Wraps `text`.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    pub(crate) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[secret]")
    }
}

/// TLS towards the agents. Everything is PEM.
#[derive(Clone, Default)]
pub struct Tls {
    /// The certificate authorities that may sign an agent's certificate; at least one.
    pub ca_pem: Vec<u8>,
    /// The client's certificate chain, where the agents ask for one.
    pub client_cert_pem: Option<Vec<u8>>,
    /// Its key.
    pub client_key_pem: Option<Secret>,
    /// The name in the agents' certificates, where it is not the host that is dialled (Consul's own tool makes
    /// certificates for `server.<datacenter>.consul`).
    pub server_name: Option<String>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls")
            .field("client_certificate", &self.client_cert_pem.is_some())
            .field("server_name", &self.server_name)
            .finish_non_exhaustive()
    }
}

/// What a call is about. A field that is not set is not sent: Consul then takes the agent's own datacenter and the
/// token's namespace, and a Consul without namespaces never sees the parameters that it would refuse.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Scope {
    /// Datacenter.
    pub datacenter: Option<String>,
    /// Namespace (Enterprise).
    pub namespace: Option<String>,
    /// Admin partition (Enterprise).
    pub partition: Option<String>,
}

impl Scope {
    /// `self`, and `defaults` where `self` says nothing.
    pub(crate) fn or(&self, defaults: &Self) -> Self {
        let pick = |own: &Option<String>, default: &Option<String>| own.clone().or_else(|| default.clone());
        Self {
            datacenter: pick(&self.datacenter, &defaults.datacenter),
            namespace: pick(&self.namespace, &defaults.namespace),
            partition: pick(&self.partition, &defaults.partition),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agent_addresses() {
        for (text, want) in [
            ("10.0.0.1:8500", "http://10.0.0.1:8500"),
            ("http://Consul.example", "http://consul.example:8500"),
            ("https://consul.example", "https://consul.example:8501"),
            ("https://[fd00::1]:443/", "https://[fd00::1]:443"),
            ("localhost", "http://localhost:8500"),
        ] {
            assert_eq!(text.parse::<AgentAddress>().unwrap().to_string(), want);
        }
        for text in
            ["", "ftp://a", "http://a/v1", "http://", "http://u:hunter2@a", "http://a:0", "unix:///run/x"]
        {
            let error = text.parse::<AgentAddress>().unwrap_err().to_string();
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn debug_shows_no_secret() {
        let mut config = ClientConfig::new(vec!["127.0.0.1".parse().unwrap()]);
        config.token = Token::Value(Secret::new("hunter2"));
        config.tls = Some(Tls { client_key_pem: Some(Secret::new("hunter2")), ..Tls::default() });
        let text = format!("{config:?}");
        assert!(!text.contains("hunter2"), "{text}");
    }

    #[test]
    fn names_need_a_resolver_and_https_needs_a_ca() {
        for agent in ["consul.example", "https://10.0.0.1"] {
            assert!(ClientConfig::new(vec![agent.parse().unwrap()]).validate().is_err(), "{agent}");
        }
        assert!(ClientConfig::new(Vec::new()).validate().is_err());
        assert!(ClientConfig::new(vec!["localhost".parse().unwrap()]).validate().is_ok());
    }
}
