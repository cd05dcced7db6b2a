//! `MeshDefaults`.

use super::{Problems, names};
use crate::bounds::MAX_PROBES;
use crate::kinds::MeshDefaults;

pub(super) fn check(out: &mut Problems, name: &str, spec: &MeshDefaults) {
    if name != "default" {
        out.error(
            "metadata.name",
            "is not `default`: there is one MeshDefaults in a namespace, of this name",
        );
    }
    if *spec == MeshDefaults::default() {
        out.warn("spec", "says nothing");
    }
    out.at_most("spec.probes", &spec.probes, MAX_PROBES);
    for (number, probe) in spec.probes.iter().enumerate() {
        let at = format!("spec.probes[{number}]");
        if probe.port == 0 {
            out.error(format!("{at}.port"), "0 is not 1 to 65535");
        }
        match (&probe.path, probe.nodes.is_empty()) {
            (Some(path), true) => {
                let fault = if path.contains('?') {
                    Err("has a query: a probe is known by its path without it".to_owned())
                } else {
                    names::path(path)
                };
                out.take(format!("{at}.path"), fault);
            }
            (None, false) => {}
            (Some(_), false) => out.error(&at, "has both `path` and `nodes`: write two probes"),
            (None, true) => out.error(&at, "has neither `path` (an HTTP probe) nor `nodes` (a TCP probe)"),
        }
        match &probe.method {
            Some(_) if probe.path.is_none() => {
                out.error(format!("{at}.method"), "is for a probe with a `path`");
            }
            Some(method) => out.take(format!("{at}.method"), names::method(method)),
            None => {}
        }
        out.at_most(&format!("{at}.nodes"), &probe.nodes, MAX_PROBES);
        for (index, node) in probe.nodes.iter().enumerate() {
            out.take(format!("{at}.nodes[{index}]"), names::cidr(node));
        }
    }
}
