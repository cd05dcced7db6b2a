//! The plugin's side of the CNI specification 1.1.0 (sections 2 to 4): a command in the environment, a configuration on
//! standard input, a result or an error on standard output.

use std::{
    collections::HashMap,
    fs::File,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{ANNOTATION, PLUGIN, POD_ANNOTATIONS};
use crate::{config::Config, redirect};

/// Bytes of a configuration with the results of the plugins before us and a pod's annotations (at most 256 KiB by the API).
const MAX_INPUT: u64 = 4 * 1024 * 1024;
/// What we speak; all say the same about what we use.
const VERSIONS: [&str; 6] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0", "1.1.1"];
/// The version in which we answer where none is known.
const NEWEST: &str = "1.1.0";

/// Codes of errors: those below 100 are the specification's (section 5).
mod code {
    pub(super) const UNSUPPORTED_FIELD: u32 = 2;
    pub(super) const INVALID_ENVIRONMENT: u32 = 4;
    pub(super) const IO: u32 = 5;
    pub(super) const DECODING: u32 = 6;
    pub(super) const INVALID_CONFIGURATION: u32 = 7;
    pub(super) const BAD_ANNOTATION: u32 = 100;
    pub(super) const KERNEL: u32 = 101;
}

/// Whether this process was started by a container runtime, under the plugin's name.
pub fn is_plugin() -> bool {
    let name = std::env::args_os().next().map(PathBuf::from);
    name.as_deref().and_then(Path::file_name).is_some_and(|name| name == PLUGIN)
}

/// Does what the environment says, answers on standard output, and logs nothing.
pub fn run() -> ExitCode {
    let mut input = Vec::new();
    let read = std::io::stdin().take(MAX_INPUT).read_to_end(&mut input);
    let answer = match read {
        Ok(_) => answer(|name| std::env::var(name).ok(), &input),
        Err(error) => Err(Failure::new(code::IO, format!("cannot read the configuration: {error}"))),
    };
    let (text, exit) = match answer {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(value)) => (value.to_string(), ExitCode::SUCCESS),
        Err(failure) => (failure.message(&input).to_string(), ExitCode::FAILURE),
    };
    // Nobody is left to tell where this fails.
    let _ = writeln!(std::io::stdout(), "{text}");
    exit
}

#[derive(Debug, PartialEq)]
struct Failure {
    code: u32,
    msg: String,
}

impl Failure {
    fn new(code: u32, msg: String) -> Self {
        Self { code, msg }
    }

    fn message(&self, input: &[u8]) -> Value {
        let version = serde_json::from_slice::<Value>(input).ok();
        let version = version.as_ref().and_then(|value| value["cniVersion"].as_str()).unwrap_or(NEWEST);
        json!({ "cniVersion": version, "code": self.code, "msg": format!("{PLUGIN}: {}", self.msg) })
    }
}

/// The part of a network configuration that concerns us.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Configuration {
    cni_version: String,
    prev_result: Option<Value>,
    #[serde(default)]
    runtime_config: HashMap<String, Value>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Versions {
    cni_version: &'static str,
    supported_versions: [&'static str; 6],
}

fn answer(variable: impl Fn(&str) -> Option<String>, input: &[u8]) -> Result<Option<Value>, Failure> {
    let command = variable("CNI_COMMAND").ok_or_else(|| {
        let text = "CNI_COMMAND is not set: this program is called by a container runtime, by its network configuration";
        Failure::new(code::INVALID_ENVIRONMENT, text.to_owned())
    })?;
    match command.as_str() {
        "VERSION" => {
            let versions = Versions { cni_version: NEWEST, supported_versions: VERSIONS };
            return Ok(Some(json!(versions)));
        }
        // What we made goes with the namespace.
        "DEL" | "GC" | "STATUS" => return Ok(None),
        "ADD" | "CHECK" => {}
        other => {
            return Err(Failure::new(
                code::INVALID_ENVIRONMENT,
                format!("no such command: CNI_COMMAND={other}"),
            ));
        }
    }
    let configuration: Configuration = serde_json::from_slice(input).map_err(|error| {
        Failure::new(code::DECODING, format!("cannot read the network configuration: {error}"))
    })?;
    let Some(result) = configuration.prev_result else {
        let text = "it must come after the plugin that makes the pod's network, in a list of plugins";
        return Err(Failure::new(code::INVALID_CONFIGURATION, text.to_owned()));
    };
    if !VERSIONS.contains(&configuration.cni_version.as_str()) {
        let text = format!("version {} of CNI is not known", configuration.cni_version);
        return Err(Failure::new(code::INVALID_CONFIGURATION, text));
    }
    if command == "ADD"
        && let Some(flags) = flags(&configuration.runtime_config)?
    {
        let namespace = variable("CNI_NETNS")
            .ok_or_else(|| Failure::new(code::INVALID_ENVIRONMENT, "CNI_NETNS is not set".to_owned()))?;
        redirect_in(Path::new(&namespace), flags)?;
    }
    Ok((command == "ADD").then_some(result))
}

/// What the pod's annotation says; `None`: it has none, or the runtime does not say.
fn flags(runtime: &HashMap<String, Value>) -> Result<Option<&str>, Failure> {
    let Some(annotations) = runtime.get(POD_ANNOTATIONS) else { return Ok(None) };
    match &annotations[ANNOTATION] {
        Value::Null => Ok(None),
        Value::String(flags) => Ok(Some(flags)),
        _ => Err(Failure::new(code::UNSUPPORTED_FIELD, format!("the annotation {ANNOTATION} is no text"))),
    }
}

/// Writes the rules in the pod's network namespace. This process has one thread and ends afterwards.
fn redirect_in(namespace: &Path, flags: &str) -> Result<(), Failure> {
    let shown = namespace.display();
    let arguments = redirect::of_pod(flags).map_err(|error| {
        Failure::new(code::BAD_ANNOTATION, format!("the annotation {ANNOTATION}: {error:#}"))
    })?;
    let file = File::open(namespace)
        .map_err(|error| Failure::new(code::IO, format!("cannot open the namespace {shown}: {error}")))?;
    setns(file, CloneFlags::CLONE_NEWNET)
        .map_err(|error| Failure::new(code::IO, format!("cannot enter the namespace {shown}: {error}")))?;
    redirect::run(&arguments, &Config::default())
        .map_err(|error| Failure::new(code::KERNEL, format!("in the namespace {shown}: {error:#}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(command: &str) -> impl Fn(&str) -> Option<String> {
        move |name| match name {
            "CNI_COMMAND" => Some(command.to_owned()),
            "CNI_NETNS" => Some("/proc/nobody/ns/net".to_owned()),
            _ => None,
        }
    }

    fn configuration(annotations: Option<&Value>) -> Vec<u8> {
        let mut runtime = json!({ "portMappings": [] });
        if let Some(annotations) = annotations {
            runtime[POD_ANNOTATIONS] = annotations.clone();
        }
        json!({
            "cniVersion": "1.0.0", "name": "pods", "type": PLUGIN, "runtimeConfig": runtime,
            "prevResult": { "cniVersion": "1.0.0", "ips": [{ "address": "10.244.0.5/24" }] },
        })
        .to_string()
        .into_bytes()
    }

    #[test]
    fn a_pod_that_is_not_injected_gets_the_result_of_the_plugins_before() {
        let result = json!({ "cniVersion": "1.0.0", "ips": [{ "address": "10.244.0.5/24" }] });
        for annotations in [None, Some(&json!({})), Some(&json!({ "kubernetes.io/config.source": "api" }))] {
            let answered = answer(environment("ADD"), &configuration(annotations)).unwrap();
            assert_eq!(answered.as_ref(), Some(&result));
        }
    }

    #[test]
    fn an_injected_pod_is_never_let_through_without_its_rules() {
        for (flags, code) in [
            (json!("--proxy-uid 15400"), code::IO),
            (json!("--proxy-uid"), code::BAD_ANNOTATION),
            (json!("--proxy-uid 15400 --remove"), code::BAD_ANNOTATION),
            (json!("--proxy-uid 15400 --table other"), code::BAD_ANNOTATION),
            (json!(""), code::BAD_ANNOTATION),
            (json!(7), code::UNSUPPORTED_FIELD),
        ] {
            let annotations = json!({ ANNOTATION: flags });
            let failure = answer(environment("ADD"), &configuration(Some(&annotations))).unwrap_err();
            assert_eq!(failure.code, code, "{failure:?}");
        }
    }

    #[test]
    fn what_is_no_call_of_a_runtime_is_told_so() {
        let code_of = |command: &str, input: &[u8]| answer(environment(command), input).unwrap_err().code;
        assert_eq!(answer(|_| None, b"").unwrap_err().code, code::INVALID_ENVIRONMENT);
        assert_eq!(code_of("LAUNCH", b"{}"), code::INVALID_ENVIRONMENT);
        assert_eq!(code_of("ADD", b"{"), code::DECODING);
        assert_eq!(code_of("ADD", br#"{"cniVersion":"1.0.0"}"#), code::INVALID_CONFIGURATION);
        assert_eq!(code_of("ADD", br#"{"cniVersion":"9.0.0","prevResult":{}}"#), code::INVALID_CONFIGURATION);
        let failure = Failure::new(code::IO, "no".to_owned());
        assert_eq!(
            failure.message(br#"{"cniVersion":"0.4.0"}"#),
            json!({ "cniVersion": "0.4.0", "code": 5, "msg": "outrigger-cni: no" })
        );
    }

    #[test]
    fn the_other_commands_change_nothing() {
        for command in ["DEL", "GC", "STATUS"] {
            assert_eq!(answer(environment(command), b""), Ok(None));
        }
        assert_eq!(answer(environment("CHECK"), &configuration(None)), Ok(None));
        let versions = answer(environment("VERSION"), b"").unwrap().unwrap();
        assert_eq!(versions["supportedVersions"][3], "1.0.0");
    }
}
