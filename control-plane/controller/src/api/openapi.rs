//! The API's own description (`OpenAPI` 3.1) and the schemas of the kinds.
//!
//! Written by hand beside the routes, from one table; a test asks the router for each line of it.

use outrigger_policy::{Kind, schema};
use serde_json::{Map, Value, json};

/// One operation.
pub(super) struct Operation {
    pub(super) method: &'static str,
    pub(super) path: &'static str,
    summary: &'static str,
    /// Parameters of the query: name, type, what it is.
    query: &'static [(&'static str, &'static str, &'static str)],
    /// Names of schemas of the request's and the response's body.
    body: Option<&'static str>,
    answer: Option<&'static str>,
    status: u16,
    /// Statuses of failures, beside 401, 403 and 503, which all have.
    failures: &'static [u16],
}

impl Operation {
    const fn get(path: &'static str, summary: &'static str, answer: &'static str) -> Self {
        Self {
            method: "get",
            path,
            summary,
            query: &[],
            body: None,
            answer: Some(answer),
            status: 200,
            failures: &[],
        }
    }
}

const DRY_RUN: (&str, &str, &str) = ("dryRun", "boolean", "Judge only");
const OBJECT: &str = "/api/v1/policies/{kind}/{namespace}/{name}";

/// All of them.
pub(super) const OPERATIONS: &[Operation] = &[
    Operation {
        query: &[
            ("kind", "string", "Only of this kind, its plural or short name"),
            ("namespace", "string", "Only of this namespace"),
        ],
        failures: &[400],
        ..Operation::get("/api/v1/policies", "Policies with what became of them", "Items")
    },
    Operation {
        method: "post",
        body: Some("Apply"),
        failures: &[400, 409, 413, 422, 503],
        ..Operation::get(
            "/api/v1/policies/apply",
            "Creates and replaces objects, all or none; answers when they are in force",
            "Applied",
        )
    },
    Operation { failures: &[404], ..Operation::get(OBJECT, "One policy", "Item") },
    Operation {
        method: "delete",
        query: &[("revision", "integer", "Only if it is still at this revision"), DRY_RUN],
        failures: &[400, 404, 409, 503],
        ..Operation::get(OBJECT, "Takes a policy away; warns of what those lose that refer to it", "Deleted")
    },
    Operation {
        failures: &[404, 503],
        ..Operation::get(
            "/api/v1/policies/{kind}/{namespace}/{name}/history",
            "Its last 20 writes, the newest first",
            "History",
        )
    },
    Operation {
        method: "post",
        body: Some("Rollback"),
        failures: &[400, 404, 409, 422, 503],
        ..Operation::get(
            "/api/v1/policies/{kind}/{namespace}/{name}/rollback",
            "Brings back what it was at a revision",
            "Applied",
        )
    },
    Operation::get("/api/v1/catalog", "Services and workloads as policies see them", "Anything"),
    Operation::get("/api/v1/services", "Services as proxies see them", "Anything"),
    Operation {
        query: &[("service", "string", "Only of `<name>.<namespace>`")],
        failures: &[400],
        ..Operation::get("/api/v1/endpoints", "Every endpoint", "Anything")
    },
    Operation::get("/api/v1/proxies", "Proxies, with what they took and refused", "Anything"),
    Operation::get(
        "/api/v1/controller",
        "Its version, the mesh's ranges, and when its certificates end",
        "Anything",
    ),
    Operation::get("/api/v1/sources", "What feeds the catalog, and the stores", "Anything"),
    Operation::get("/api/v1/schemas", "JSON schema of each kind", "Anything"),
    Operation::get("/api/v1/tokens", "Join tokens", "Anything"),
    Operation {
        method: "post",
        body: Some("Anything"),
        status: 201,
        failures: &[400, 503, 507],
        ..Operation::get("/api/v1/tokens", "Makes a join token", "Anything")
    },
    Operation {
        method: "delete",
        answer: None,
        status: 204,
        failures: &[404, 503],
        ..Operation::get("/api/v1/tokens/{id}", "Revokes a join token", "Anything")
    },
    Operation::get("/api/v1/openapi.json", "This description; needs no token", "Anything"),
];

/// JSON schema by kind.
pub(super) fn schemas() -> Value {
    Kind::ALL.into_iter().map(|kind| (kind.to_string(), schema::json(kind))).collect::<Map<_, _>>().into()
}

/// The description.
pub(super) fn document() -> Value {
    let mut paths: Map<String, Value> = Map::new();
    for operation in OPERATIONS {
        let path = paths.entry(operation.path).or_insert_with(|| json!({}));
        path[operation.method] = describe(operation);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Outrigger controller",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Every request but the one for this description bears the token of <data_dir>/admin-token or, with \
                            kubernetes.enabled, one that the cluster's API server takes; its RBAC then decides. \
                            With the admin token a header `outrigger-author` may say who writes.",
        },
        "security": [{ "token": [] }],
        "paths": paths,
        "components": {
            "securitySchemes": { "token": { "type": "http", "scheme": "bearer" } },
            "schemas": components(),
        },
    })
}

fn describe(operation: &Operation) -> Value {
    let segments = operation.path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
    let in_path = segments
        .map(|name| json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } }));
    let in_query = operation.query.iter().map(|(name, kind, what)| {
        json!({ "name": name, "in": "query", "description": what, "schema": { "type": kind } })
    });
    let parameters: Vec<Value> = in_path.chain(in_query).collect();
    let content = |name: &str| {
        let schema = json!({ "$ref": format!("#/components/schemas/{name}") });
        json!({ "application/json": { "schema": schema } })
    };
    let mut responses = Map::new();
    let success = match operation.answer {
        Some(name) => json!({ "description": "Done", "content": content(name) }),
        None => json!({ "description": "Done" }),
    };
    responses.insert(operation.status.to_string(), success);
    let open = operation.path.ends_with("/openapi.json");
    let guarded: &[u16] = if open { &[] } else { &[401, 403, 503] };
    for status in operation.failures.iter().chain(guarded) {
        let failure = json!({ "description": "Nothing was changed", "content": content("Error") });
        responses.insert(status.to_string(), failure);
    }
    let mut described = json!({
        "summary": operation.summary,
        "parameters": parameters,
        "responses": responses,
    });
    if let Some(name) = operation.body {
        described["requestBody"] = json!({ "required": true, "content": content(name) });
    }
    if open {
        described["security"] = json!([]);
    }
    described
}

fn components() -> Value {
    let text = json!({ "type": "string" });
    let number = json!({ "type": "integer" });
    let flag = json!({ "type": "boolean" });
    let list = |of: Value| json!({ "type": "array", "items": of });
    let to = |name: &str| json!({ "$ref": format!("#/components/schemas/{name}") });
    let object = |fields: Value| json!({ "type": "object", "properties": fields });
    // A policy is one of the kinds; their schemas are whole documents, with definitions of their own.
    let policy = json!({ "type": "object", "description": "One of the kinds of /api/v1/schemas" });
    let item = object(json!({
        "object": policy, "revision": number, "created": number, "updated": number, "author": text,
        "status": object(json!({
            "conditions": list(object(json!({
                "type": text, "status": text, "reason": text, "message": text, "parent": { "type": "object" },
            }))),
            "proxies": object(json!({
                "on": number,
                "accepted": number,
                "refused": list(object(json!({ "proxy": text, "reason": text }))),
            })),
        })),
    }));
    json!({
        "Anything": { "type": "object" },
        "Error": object(json!({ "error": object(json!({
            "code": {
                "type": "string",
                "enum": ["bad_request", "unauthorized", "forbidden", "not_found", "conflict", "too_large", "invalid", "store_unavailable", "cluster_unavailable", "full"],
            },
            "message": text,
            "faults": list(object(json!({
                "file": text, "line": number, "column": number, "path": text, "message": text,
            }))),
        })) })),
        "Item": item,
        "Items": object(json!({ "revision": number, "items": list(to("Item")) })),
        "Apply": {
            "type": "object",
            "required": ["objects"],
            "properties": {
                "objects": list(policy.clone()),
                "deletions": {
                    "type": "array",
                    "description": "`<Kind> <namespace>/<name>` of policies that are taken away in the same write",
                    "items": text,
                },
                "dryRun": flag,
                "expect": {
                    "type": "object",
                    "description": "`<Kind> <namespace>/<name>` -> revision; 0: it must not be there",
                    "additionalProperties": number,
                },
            },
        },
        "Applied": object(json!({ "revision": number, "results": list(object(json!({
            "key": text,
            "action": { "type": "string", "enum": ["created", "configured", "unchanged", "deleted"] },
            "revision": number,
            "warnings": list(text.clone()),
        }))) })),
        "Deleted": object(json!({ "revision": number, "warnings": list(text.clone()) })),
        "History": object(json!({ "items": list(object(json!({
            "revision": number, "time": number, "author": text, "action": text, "object": policy,
        }))) })),
        "Rollback": {
            "type": "object",
            "required": ["revision"],
            "properties": { "revision": number, "dryRun": flag },
        },
    })
}
