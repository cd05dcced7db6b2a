//! Independent HTTP clients against independent HTTP servers, through two sidecars, in each version of HTTP that both of
//! a pair speak in clear text.
//!
//! What a client or server cannot do by itself is left out of its pairs, never out of a pair that can: [`able`] says
//! what and why.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context as _, bail, ensure};
use outrigger_e2e::sandbox;
use outrigger_e2e::suite::{Case, case};

use crate::{GO, HYPER, NGHTTPD, Service, World, hyper_client, tool};

/// A large body: more than every window and buffer on the way holds at first.
pub(crate) const MEBIBYTE: usize = 1 << 20;
/// Requests on one connection.
pub(crate) const MANY: usize = 200;
/// How much of what a client said is shown where something is missing in it.
const SHOWN_LINES: usize = 60;
/// What an early hint of the Go server says.
const HINT: &str = "</style.css>; rel=preload";

#[derive(Clone, Copy, Debug, PartialEq)]
enum Client {
    Curl,
    Nghttp,
    Go,
    Hyper,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Server {
    Hyper,
    Go,
    Nghttpd,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Version {
    Http1,
    Http2,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Exercise {
    /// Bodies of no byte, some, and a mebibyte come down.
    Get,
    /// A mebibyte goes up and comes back.
    Post,
    /// Trailers behind a request's body.
    TrailersUp,
    /// Trailers behind a response's body.
    TrailersDown,
    /// The client waits for its invitation, and without one for ever.
    Continue,
    /// An interim response that nobody asked for.
    Interim,
    /// Many requests on one connection.
    Many,
}

const EXERCISES: [(Exercise, &str); 7] = [
    (Exercise::Get, "bodies down"),
    (Exercise::Post, "a mebibyte both ways"),
    (Exercise::TrailersUp, "trailers up"),
    (Exercise::TrailersDown, "trailers down"),
    (Exercise::Continue, "100-continue"),
    (Exercise::Interim, "early hints"),
    (Exercise::Many, "many requests on one connection"),
];

/// A client that speaks one version to one server.
#[derive(Clone, Copy)]
pub(crate) struct Pair {
    client: Client,
    pub(crate) version: Version,
    server: Server,
}

pub(crate) fn cases() -> Vec<Case<World>> {
    let mut cases = Vec::new();
    for version in [Version::Http1, Version::Http2] {
        for client in [Client::Curl, Client::Nghttp, Client::Go, Client::Hyper] {
            for server in [Server::Hyper, Server::Go, Server::Nghttpd] {
                let pair = Pair { client, version, server };
                for (exercise, what) in EXERCISES {
                    if able(pair, exercise) {
                        let who = format!("{version:?}: {client:?} to {server:?}").to_lowercase();
                        cases.push(case(format!("{who}: {what}"), move |world| pair.run(exercise, world)));
                    }
                }
            }
        }
    }
    cases
}

/// Whether both of a pair can do this at all, with no mesh between them.
fn able(pair: Pair, exercise: Exercise) -> bool {
    let Pair { client, version, server } = pair;
    let nghttp2 = client == Client::Nghttp || server == Server::Nghttpd;
    if nghttp2 && (version == Version::Http1 || !sandbox::wants_real_root()) {
        // They speak HTTP/2 only, and are Debian's packages.
        return false;
    }
    match exercise {
        Exercise::Get | Exercise::Post => true,
        // curl sends none, and nghttpd does not say what it got.
        Exercise::TrailersUp => client != Client::Curl && server != Server::Nghttpd,
        // In HTTP/2 curl 7.88 does not show trailers, and after prior knowledge it fails with a connection's second request.
        Exercise::TrailersDown | Exercise::Many => client != Client::Curl || version == Version::Http1,
        // hyper's client does not wait, nor does curl in HTTP/2; hyper's server does not invite where it answers before it
        // reads, as an echo does.
        Exercise::Continue => match version {
            _ if server == Server::Hyper => false,
            Version::Http1 => client != Client::Hyper,
            Version::Http2 => matches!(client, Client::Nghttp | Client::Go),
        },
        // hyper's client does not show what it gets, and of the servers only Go's program sends one.
        Exercise::Interim => client != Client::Hyper && server == Server::Go,
    }
}

/// nghttpd with files at the paths that the other servers have. It echoes uploads and sends a trailer with every answer.
pub(crate) fn nghttpd() -> anyhow::Result<Command> {
    let root = sandbox::get().work.join("nghttpd");
    fs::create_dir_all(root.join("bytes")).context("creating nghttpd's folder")?;
    let write = |path: &str, content: &[u8]| {
        fs::write(root.join(path), content).with_context(|| format!("writing nghttpd's {path}"))
    };
    write("trailers", b"body before trailers\n")?;
    for length in (0..=MANY).chain([1000, MEBIBYTE]) {
        write(&format!("bytes/{length}"), &pattern(length))?;
    }
    let mut command = debian("nghttpd", "nghttp2-server")?;
    command.args(["--no-tls", "--echo-upload", "--trailer", "x-checksum: 0011", "--htdocs"]).arg(root);
    command.arg(NGHTTPD.port.to_string());
    Ok(command)
}

/// A program of a Debian package.
fn debian(program: &str, package: &str) -> anyhow::Result<Command> {
    let path = ["/usr/bin", "/usr/sbin"].map(|folder| Path::new(folder).join(program));
    let path = path.iter().find(|path| path.exists());
    let path = path.with_context(|| format!("{program} is missing: apt-get install {package}"))?;
    Ok(Command::new(path))
}

/// Bytes that are not all the same, as all servers make them.
pub(crate) fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| u8::try_from(i * 7 % 251).unwrap_or_default()).collect()
}

/// Fails unless `seen` is `wanted`, without printing a mebibyte.
pub(crate) fn same(what: &str, seen: &[u8], wanted: &[u8]) -> anyhow::Result<()> {
    ensure!(seen == wanted, "{what}: {} bytes instead of {}, or others", seen.len(), wanted.len());
    Ok(())
}

/// Fails unless `text` has `wanted` somewhere.
pub(crate) fn says(text: &[u8], wanted: &str) -> anyhow::Result<()> {
    let text = String::from_utf8_lossy(text);
    let start = || text.lines().take(SHOWN_LINES).collect::<Vec<_>>().join("\n");
    ensure!(text.contains(wanted), "nothing says {wanted:?}:\n{}", start());
    Ok(())
}

/// A file with a large body, for clients that send files.
fn large_file() -> anyhow::Result<PathBuf> {
    let path = sandbox::get().work.join("mebibyte");
    fs::write(&path, pattern(MEBIBYTE)).context("writing a large body")?;
    Ok(path)
}

impl Pair {
    async fn run(self, exercise: Exercise, world: Arc<World>) -> anyhow::Result<()> {
        match self.client {
            Client::Curl => self.curl(exercise, &world).await,
            Client::Nghttp => self.nghttp(exercise, &world).await,
            Client::Go => self.go(exercise, &world).await,
            Client::Hyper => self.hyper(exercise, &world).await,
        }
    }

    pub(crate) fn service(self) -> Service {
        match self.server {
            Server::Hyper => HYPER,
            Server::Go => GO,
            Server::Nghttpd => NGHTTPD,
        }
    }

    pub(crate) fn url(self, path: &str) -> String {
        format!("http://{}{path}", self.service().authority())
    }

    async fn curl(self, exercise: Exercise, world: &World) -> anyhow::Result<()> {
        let body = sandbox::get().work.join("curl-body");
        let (version, shown) = match self.version {
            Version::Http1 => ("--http1.1", "1.1 200\n"),
            Version::Http2 => ("--http2-prior-knowledge", "2 200\n"),
        };
        // Runs curl and checks version and status; all that it said of headers, and the body.
        let run = async |arguments: &[&str], path: &str| {
            let mut command = Command::new("curl");
            command.args(["--silent", "--show-error", "--verbose", "--max-time", "20", version]);
            command.args(["--write-out", "%{http_version} %{http_code}\n", "--output"]).arg(&body);
            command.args(arguments).arg(self.url(path));
            let output = world.web.host.finish(command).await?;
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            ensure!(said == shown, "version and status are {said:?} instead of {shown:?}");
            anyhow::Ok((output.stderr, fs::read(&body).context("reading curl's output")?))
        };
        let upload = format!("@{}", large_file()?.display());
        match exercise {
            Exercise::Get => {
                for length in [0, 1000, MEBIBYTE] {
                    // An empty body leaves no file.
                    fs::write(&body, "").context("clearing curl's output")?;
                    let path = format!("/bytes/{length}");
                    same(&path, &run(&[], &path).await?.1, &pattern(length))?;
                }
            }
            Exercise::Post => {
                let (_, seen) = run(&["--header", "Expect:", "--data-binary", &upload], "/echo").await?;
                same("with its length", &seen, &pattern(MEBIBYTE))?;
                if self.version == Version::Http1 {
                    let chunked = ["--header", "Expect:", "--header", "Transfer-Encoding: chunked"];
                    let (_, seen) =
                        run(&[&chunked[..], &["--data-binary", &upload]].concat(), "/echo").await?;
                    same("in chunks", &seen, &pattern(MEBIBYTE))?;
                }
            }
            Exercise::TrailersDown => {
                let fields = sandbox::get().work.join("curl-fields");
                let dump = fields.to_str().context("a path is text")?;
                run(&["--header", "TE: trailers", "--dump-header", dump], "/trailers").await?;
                let seen = fs::read(&fields).context("reading the fields that curl saw")?;
                says(&seen.to_ascii_lowercase(), "\r\nx-checksum: 0011\r\n")?;
            }
            Exercise::Continue => {
                // It waits longer for the invitation than for the whole.
                let wait = ["--header", "Expect: 100-continue", "--expect100-timeout", "60"];
                let (headers, seen) =
                    run(&[&wait[..], &["--data-binary", &upload]].concat(), "/echo").await?;
                says(&headers, "< HTTP/1.1 100 Continue")?;
                same("after an invitation", &seen, &pattern(MEBIBYTE))?;
            }
            Exercise::Interim => {
                let (headers, seen) = run(&[], "/interim").await?;
                says(&headers, " 103")?;
                says(headers.to_ascii_lowercase().as_slice(), &format!("< link: {HINT}"))?;
                same("after a hint", &seen, b"after a hint\n")?;
            }
            Exercise::Many => {
                let mut command = Command::new("curl");
                command
                    .args(["--silent", "--show-error", "--max-time", "20", version, "--output"])
                    .arg(&body);
                command.args(["--write-out", "%{http_code} %{size_download} %{num_connects}\n"]);
                command.arg(self.url(&format!("/bytes/[1-{MANY}]")));
                let seen = world.web.host.output(command).await?;
                let mut wanted = String::from("200 1 1\n");
                for length in 2..=MANY {
                    writeln!(wanted, "200 {length} 0")?;
                }
                ensure!(seen == wanted, "status, size and new connections are:\n{seen}");
            }
            Exercise::TrailersUp => bail!("curl sends no trailers"),
        }
        Ok(())
    }

    async fn nghttp(self, exercise: Exercise, world: &World) -> anyhow::Result<()> {
        let run = async |arguments: &[&str], path: &str| {
            let mut command = debian("nghttp", "nghttp2-client")?;
            command.args(["--timeout", "20"]).args(arguments).arg(self.url(path));
            anyhow::Ok(world.web.host.finish(command).await?.stdout)
        };
        let file = large_file()?;
        let file = file.to_str().context("a path is text")?;
        match exercise {
            Exercise::Get => {
                for length in [0, 1000, MEBIBYTE] {
                    let path = format!("/bytes/{length}");
                    same(&path, &run(&[], &path).await?, &pattern(length))?;
                }
            }
            Exercise::Post => {
                same("with its length", &run(&["--data", file], "/echo").await?, &pattern(MEBIBYTE))?;
                let without = ["--no-content-length", "--data", file];
                same("without its length", &run(&without, "/echo").await?, &pattern(MEBIBYTE))?;
            }
            Exercise::TrailersUp => {
                let seen = run(&["--trailer", "x-sum: 42", "--data", file], "/describe").await?;
                says(&seen, "[\"x-sum\",\"42\"]")?;
            }
            Exercise::TrailersDown => {
                says(&run(&["--null-out", "--verbose"], "/trailers").await?, "x-checksum: 0011")?;
            }
            Exercise::Continue => {
                // It would send its body without an invitation in the end; only the invitation is asked for here.
                let wait = ["--null-out", "--verbose", "--expect-continue", "--data", file];
                let seen = run(&wait, "/echo").await?;
                says(&seen, ":status: 100")?;
                says(&seen, ":status: 200")?;
            }
            Exercise::Interim => {
                let seen = run(&["--null-out", "--verbose"], "/interim").await?;
                says(&seen, ":status: 103")?;
                says(&seen, &format!("link: {HINT}"))?;
                says(&seen, ":status: 200")?;
            }
            Exercise::Many => {
                // All at once, as far as the peer allows.
                let multiply = MANY.to_string();
                let seen = run(&["--null-out", "--stat", "--multiply", &multiply], "/bytes/100").await?;
                let seen = String::from_utf8_lossy(&seen).into_owned();
                let complete = seen.lines().filter(|line| line.ends_with(" 200  100 /bytes/100")).count();
                ensure!(complete == MANY, "{complete} of {MANY} came:\n{seen}");
            }
        }
        Ok(())
    }

    /// The program checks for itself.
    async fn go(self, exercise: Exercise, world: &World) -> anyhow::Result<()> {
        let exercise = match exercise {
            Exercise::Get => "get",
            Exercise::Post => "post",
            Exercise::TrailersUp => "trailers-up",
            Exercise::TrailersDown => "trailers-down",
            Exercise::Continue => "continue",
            Exercise::Interim => "interim",
            Exercise::Many => "many",
        };
        let version = match self.version {
            Version::Http1 => "h1",
            Version::Http2 => "h2",
        };
        world.web.host.output(tool("http-peer", &[exercise, version, &self.url("")])?).await.map(drop)
    }

    async fn hyper(self, exercise: Exercise, world: &World) -> anyhow::Result<()> {
        let service = self.service();
        let name = format!("{}.service.consul", service.name);
        let address = world.web.look_up(&name, service.port).await?;
        let run = move || async move { hyper_client::run(self, address, exercise).await };
        world.web.host.run(run).await
    }
}
