//! The routes and their description, said once: the router serves what the OpenAPI document describes.
//!
//! Schemas are those of the types that are parsed and written (`kelvin-api`). The document is served as
//! `/openapi.json`, kept as `openapi/kelvin.json`, and compared with what E2B's own says of the same routes
//! (`openapi/e2b.json`: names and numbers, taken from its specification) by the tests here.

use std::collections::{BTreeMap, BTreeSet};

use axum::Router;
use axum::handler::Handler;
use axum::routing::{MethodFilter, MethodRouter, on};
use http::Method;
use kelvin_api::error::{ApiError, ErrorCode};
use schemars::generate::{SchemaGenerator, SchemaSettings};
use schemars::{JsonSchema, Schema};
use serde_json::{Value, json};

use crate::codes::{self, Codes};
use crate::control::Control;

type MakeSchema = fn(&mut SchemaGenerator) -> Schema;

/// What an operation is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tag {
    Sandboxes,
    Metrics,
    Snapshots,
    Templates,
    Access,
    Node,
}

impl Tag {
    const ALL: [Self; 6] =
        [Self::Sandboxes, Self::Metrics, Self::Snapshots, Self::Templates, Self::Access, Self::Node];

    fn name(self) -> &'static str {
        match self {
            Self::Sandboxes => "sandboxes",
            Self::Metrics => "metrics",
            Self::Snapshots => "snapshots",
            Self::Templates => "templates",
            Self::Access => "access",
            Self::Node => "node",
        }
    }

    fn description(self) -> &'static str {
        match self {
            Self::Sandboxes => {
                "Create, list, pause, resume, fork and end sandboxes; their networks and logs."
            }
            Self::Metrics => "What sandboxes and projects use.",
            Self::Snapshots => "Snapshots that are kept.",
            Self::Templates => "What sandboxes are made from, and tags.",
            Self::Access => "Projects (teams), API keys, limits and the audit log.",
            Self::Node => "The host: what runs, warm machines, garbage, metrics of the server.",
        }
    }
}

/// One operation, as it is described.
pub(crate) struct Operation {
    id: &'static str,
    tag: Tag,
    summary: &'static str,
    query: Vec<(&'static str, &'static str)>,
    body: Option<MakeSchema>,
    body_required: bool,
    replies: Vec<(u16, Option<MakeSchema>)>,
    /// The media type of a reply that comes in parts, and the schema of one.
    events: Option<(&'static str, MakeSchema)>,
    errors: Codes,
    tells_secret: bool,
    admin: bool,
    /// Its URL is signed: it asks for no API key.
    signed: bool,
}

/// An operation: its id, which clients are named after, what it is about, and what it does.
pub(crate) fn op(id: &'static str, tag: Tag, summary: &'static str) -> Operation {
    Operation {
        id,
        tag,
        summary,
        query: Vec::new(),
        body: None,
        body_required: true,
        replies: Vec::new(),
        events: None,
        errors: &[],
        tells_secret: false,
        admin: false,
        signed: false,
    }
}

fn schema_of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

impl Operation {
    /// More of its query parameters, with what they are.
    pub(crate) fn query(mut self, query: &[(&'static str, &'static str)]) -> Self {
        self.query.extend(query);
        self
    }

    /// Its body.
    pub(crate) fn body<T: JsonSchema>(mut self) -> Self {
        self.body = Some(schema_of::<T>);
        self
    }

    /// A body that may be left out.
    pub(crate) fn optional<T: JsonSchema>(mut self) -> Self {
        self.body_required = false;
        self.body::<T>()
    }

    /// A reply with a body.
    pub(crate) fn reply<T: JsonSchema>(mut self, status: u16) -> Self {
        self.replies.push((status, Some(schema_of::<T>)));
        self
    }

    /// Its reply with status 200 in parts, for who accepts `media_type`.
    pub(crate) fn events<T: JsonSchema>(mut self, media_type: &'static str) -> Self {
        self.events = Some((media_type, schema_of::<T>));
        self
    }

    /// A reply without.
    pub(crate) fn empty(mut self, status: u16) -> Self {
        self.replies.push((status, None));
        self
    }

    /// The failures that are its own; those that follow from its method, path, query and body are known.
    pub(crate) fn errors(mut self, errors: Codes) -> Self {
        self.errors = errors;
        self
    }

    /// Its reply tells a secret, so it takes no idempotency key.
    pub(crate) fn secret(mut self) -> Self {
        self.tells_secret = true;
        self
    }

    /// Whether it takes an idempotency key.
    fn takes_key(&self, method: &str) -> bool {
        changes(method) && !self.tells_secret && !self.signed
    }

    /// Every failure that it can have, but for those of status 500.
    fn codes(&self, method: &str, path: &str) -> BTreeSet<ErrorCode> {
        let mut groups: Vec<&[ErrorCode]> = self.errors.to_vec();
        let derived: [(bool, &[ErrorCode]); 7] = [
            (!self.signed, codes::EVERYWHERE),
            (self.admin, codes::ADMIN),
            (self.takes_key(method), codes::CHANGE),
            (changes(method) && self.tells_secret, codes::SECRET_CHANGE),
            (self.body.is_some(), codes::BODY),
            (!self.query.is_empty(), codes::QUERY),
            (path.contains('{'), codes::PATH),
        ];
        groups.extend(derived.into_iter().filter(|(has, _)| *has).map(|(_, group)| group));
        groups.into_iter().flatten().copied().collect()
    }
}

/// Whether requests with this method, in lower case, are taken for changes.
fn changes(method: &str) -> bool {
    method != "get"
}

/// What the parameter `name` of `path` is.
fn path_parameter(path: &str, name: &str) -> &'static str {
    match (path.split('/').find(|part| !matches!(*part, "" | "v2" | "v3")), name) {
        (Some("sandboxes"), _) => "Id of the sandbox.",
        (Some("teams"), _) => "Id of the project.",
        (Some("projects"), _) => "Name of the project.",
        (Some("api-keys"), _) => "Id of the API key.",
        (Some("snapshots"), _) => "Id or name of the snapshot.",
        (Some("templates"), "build") | (Some("builds"), _) => "Id of the build.",
        (Some("templates" | "uploads"), "hash") => "What the files are called: 64 hexadecimal digits.",
        (Some("templates"), "alias") => "Name of a template, or id or name of a snapshot.",
        (Some("templates" | "pools"), _) => "Name of the template.",
        _ => "",
    }
}

/// Which failures each route can have: by path, then by method.
#[derive(Debug, Default)]
pub(crate) struct Documented(BTreeMap<&'static str, BTreeMap<String, BTreeSet<ErrorCode>>>);

impl Documented {
    /// Whether the route may fail so. Yes where there is no such route.
    pub(crate) fn has(&self, method: &Method, path: &str, code: ErrorCode) -> bool {
        let method = if *method == Method::HEAD { &Method::GET } else { method };
        let found = self.0.get(path).and_then(|methods| methods.get(&method.as_str().to_ascii_lowercase()));
        codes::is_ours(code) || found.is_none_or(|codes| codes.contains(&code))
    }
}

fn served<H, T>(method: &Method, handler: H) -> MethodRouter<Control>
where
    H: Handler<T, Control>,
    T: 'static,
{
    on(MethodFilter::try_from(method.clone()).unwrap_or(MethodFilter::GET), handler)
}

/// A router that knows what its routes are.
pub(crate) struct Api {
    pub(crate) router: Router<Control>,
    /// Routes whose URLs are signed.
    pub(crate) signed: Router<Control>,
    operations: BTreeMap<&'static str, BTreeMap<String, Operation>>,
}

impl Api {
    pub(crate) fn new() -> Self {
        Self { router: Router::new(), signed: Router::new(), operations: BTreeMap::new() }
    }

    /// One route.
    pub(crate) fn route<H, T>(
        mut self,
        method: &Method,
        path: &'static str,
        handler: H,
        operation: Operation,
    ) -> Self
    where
        H: Handler<T, Control>,
        T: 'static,
    {
        self.router = self.router.route(path, served(method, handler));
        self.operations.entry(path).or_default().insert(method.as_str().to_ascii_lowercase(), operation);
        self
    }

    /// One route whose URLs are signed: it asks for no API key.
    pub(crate) fn signed_route<H, T>(
        mut self,
        method: &Method,
        path: &'static str,
        handler: H,
        mut operation: Operation,
    ) -> Self
    where
        H: Handler<T, Control>,
        T: 'static,
    {
        self.signed = self.signed.route(path, served(method, handler));
        operation.signed = true;
        self.operations.entry(path).or_default().insert(method.as_str().to_ascii_lowercase(), operation);
        self
    }

    /// These routes and those.
    pub(crate) fn merge(mut self, other: Self) -> Self {
        self.router = self.router.merge(other.router);
        self.signed = self.signed.merge(other.signed);
        for (path, operations) in other.operations {
            self.operations.entry(path).or_default().extend(operations);
        }
        self
    }

    /// The same for the server's own key alone, which `guard` sees to.
    pub(crate) fn for_admins(mut self, guard: impl FnOnce(Router<Control>) -> Router<Control>) -> Self {
        self.router = guard(self.router);
        for operation in self.operations.values_mut().flat_map(BTreeMap::values_mut) {
            operation.admin = true;
        }
        self
    }

    /// Which failures each route can have.
    pub(crate) fn documented(&self) -> Documented {
        let of = |(path, operations): (&&'static str, &BTreeMap<String, Operation>)| {
            let codes =
                |(method, operation): (&String, &Operation)| (method.clone(), operation.codes(method, path));
            (*path, operations.iter().map(codes).collect())
        };
        Documented(self.operations.iter().map(of).collect())
    }

    /// The OpenAPI document.
    pub(crate) fn document(&self) -> Value {
        let mut generator = SchemaSettings::openapi3().into_generator();
        let error = schema_of::<ApiError>(&mut generator);
        let mut paths = serde_json::Map::new();
        for (path, operations) in &self.operations {
            let described: serde_json::Map<String, Value> = operations
                .iter()
                .map(|(method, operation)| {
                    (method.clone(), describe(method, path, operation, &mut generator, &error))
                })
                .collect();
            paths.insert((*path).to_owned(), described.into());
        }
        let schemas = generator.take_definitions(true);
        json!({
            "openapi": "3.0.3",
            "info": {
                "title": "Kelvin",
                "description": "The control API. Compatible with E2B's, with additions of its own.",
                "version": env!("CARGO_PKG_VERSION"),
                "license": { "name": "Apache-2.0" },
            },
            "security": [{ "ApiKey": [] }],
            "tags": Tag::ALL.map(|tag| json!({ "name": tag.name(), "description": tag.description() })),
            "paths": paths,
            "components": {
                "schemas": schemas,
                "securitySchemes": { "ApiKey": { "type": "apiKey", "in": "header", "name": "X-API-KEY" } },
            },
        })
    }
}

/// The parameters of an operation: of its path, its query and its headers.
fn parameters(method: &str, path: &str, operation: &Operation) -> Vec<Value> {
    let text = json!({ "type": "string" });
    let mut parameters: Vec<Value> = path
        .split('/')
        .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
        .map(|name| {
            let what = path_parameter(path, name);
            json!({ "name": name, "in": "path", "required": true, "description": what, "schema": text })
        })
        .collect();
    parameters.extend(
        operation
            .query
            .iter()
            .map(|(name, what)| json!({ "name": name, "in": "query", "description": what, "schema": text })),
    );
    if operation.takes_key(method) {
        parameters.push(json!({
            "name": "Idempotency-Key",
            "in": "header",
            "description": "Kelvin: at most 255 characters; the same request with the same key is done once within 24 hours.",
            "schema": text,
        }));
    }
    parameters
}

fn describe(
    method: &str,
    path: &str,
    operation: &Operation,
    generator: &mut SchemaGenerator,
    error: &Schema,
) -> Value {
    let content = |schema: &Value| json!({ "application/json": { "schema": schema } });
    let mut replies = serde_json::Map::new();
    for (status, schema) in &operation.replies {
        let mut reply = json!({ "description": "Done." });
        if let Some(make) = schema {
            reply["content"] = content(&make(generator).to_value());
        }
        if let Some((media_type, make)) = operation.events
            && *status == 200
        {
            reply["content"][media_type] = json!({ "schema": make(generator).to_value() });
        }
        replies.insert(status.to_string(), reply);
    }
    let mut by_status: BTreeMap<u16, Vec<&str>> = BTreeMap::from([(500, Vec::new())]);
    for code in operation.codes(method, path) {
        by_status.entry(code.kind().status().as_u16()).or_default().push(code.as_str());
    }
    for (status, codes) in by_status {
        let text = http::StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason());
        let schema = match codes.is_empty() {
            true => error.clone().to_value(),
            false => json!({ "allOf": [error, { "properties": { "error_code": {
                "description": "What failed, for programs.",
                "type": "string",
                "enum": codes,
            } } }] }),
        };
        let reply = json!({ "description": text.unwrap_or("Refused"), "content": content(&schema) });
        replies.insert(status.to_string(), reply);
    }
    let mut described = json!({
        "operationId": operation.id,
        "tags": [operation.tag.name()],
        "summary": operation.summary,
        "parameters": parameters(method, path, operation),
        "responses": replies,
    });
    if operation.signed {
        described["security"] = json!([]);
    }
    if let Some(make) = operation.body {
        described["requestBody"] =
            json!({ "required": operation.body_required, "content": content(&make(generator).to_value()) });
    }
    described
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api;

    const KEPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../openapi/kelvin.json");
    const E2B: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../openapi/e2b.json");

    #[test]
    fn the_document_in_the_repository_is_the_one_that_is_served() {
        let now = serde_json::to_string_pretty(&api::routes().document()).unwrap() + "\n";
        if std::env::var_os("KELVIN_WRITE_OPENAPI").is_some() {
            std::fs::write(KEPT, &now).unwrap();
        }
        let kept = std::fs::read_to_string(KEPT).unwrap();
        assert!(kept == now, "openapi/kelvin.json is out of date: `cargo xtask openapi` writes it");
    }

    /// What of `schema` has no description, by name.
    fn undescribed(at: &str, schema: &Value, found: &mut Vec<String>) {
        if !schema.is_object() {
            return;
        }
        for (name, field) in schema["properties"].as_object().into_iter().flatten() {
            let at = format!("{at}.{name}");
            // What names a variant says nothing that is not said of the variant.
            let is_one_word = field["enum"].as_array().is_some_and(|words| words.len() == 1);
            let names_a_variant = is_one_word && schema["description"].is_string();
            if field["description"].as_str().is_none_or(str::is_empty) && !names_a_variant {
                found.push(at.clone());
            }
            undescribed(&at, field, found);
        }
        for inside in ["items", "additionalProperties"] {
            undescribed(at, &schema[inside], found);
        }
        for several in ["allOf", "anyOf", "oneOf"] {
            for part in schema[several].as_array().into_iter().flatten() {
                match part["properties"].as_object() {
                    // A variant: what is said of it is said of its content.
                    Some(only) if only.len() == 1 && part["description"].is_string() => {
                        only.values().for_each(|content| undescribed(at, content, found));
                    }
                    _ => undescribed(at, part, found),
                }
            }
        }
    }

    #[test]
    fn operations_fields_and_parameters_say_what_they_are() {
        let document = api::routes().document();
        let (mut wrong, mut ids) = (Vec::new(), BTreeSet::new());
        let tags: BTreeMap<&str, &str> = document["tags"]
            .as_array()
            .unwrap()
            .iter()
            .map(|tag| (tag["name"].as_str().unwrap(), tag["description"].as_str().unwrap()))
            .collect();
        let is_camel = |id: &str| {
            id.starts_with(|first: char| first.is_ascii_lowercase())
                && id.chars().all(|c| c.is_ascii_alphanumeric())
        };
        let operations = document["paths"].as_object().unwrap().iter().flat_map(|(path, methods)| {
            methods
                .as_object()
                .unwrap()
                .iter()
                .map(move |(method, operation)| (format!("{method} {path}"), operation))
        });
        for (at, operation) in operations {
            let id = operation["operationId"].as_str().unwrap_or_default();
            if !is_camel(id) || !ids.insert(id) {
                wrong.push(format!("{at}: the id {id:?} is not camelCase, or another's"));
            }
            let tag = operation["tags"][0].as_str().unwrap_or_default();
            if tags.get(tag).is_none_or(|text| text.is_empty()) {
                wrong.push(format!("{at}: the tag {tag:?} is not described"));
            }
            if operation["summary"].as_str().is_none_or(str::is_empty) {
                wrong.push(format!("{at}: no summary"));
            }
            for parameter in operation["parameters"].as_array().unwrap() {
                if parameter["description"].as_str().is_none_or(str::is_empty) {
                    wrong.push(format!("{at}: the parameter {} has no description", parameter["name"]));
                }
            }
            for reply in operation["responses"].as_object().unwrap().values() {
                undescribed(&at, &reply["content"]["application/json"]["schema"], &mut wrong);
            }
        }
        for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
            if schema["description"].as_str().is_none_or(str::is_empty) {
                wrong.push(format!("the schema {name}"));
            }
            undescribed(name, schema, &mut wrong);
        }
        assert!(wrong.is_empty(), "{} are not described: {wrong:#?}", wrong.len());
    }

    #[test]
    fn a_field_without_a_description_is_seen() {
        let mut found = Vec::new();
        let nested =
            json!({ "properties": { "a": { "description": "A.", "items": { "properties": { "b": {} } } } } });
        undescribed("S", &nested, &mut found);
        assert_eq!(found, ["S.a.b"]);
    }

    /// The schema behind `value`, with its reference followed.
    fn follow<'a>(document: &'a Value, mut value: &'a Value) -> &'a Value {
        while let Some(name) = value["$ref"].as_str().and_then(|name| name.rsplit('/').next()) {
            value = &document["components"]["schemas"][name];
        }
        value
    }

    fn body_of<'a>(document: &'a Value, content: &'a Value) -> &'a Value {
        let schema = follow(document, &content["content"]["application/json"]["schema"]);
        if schema["type"] == "array" { follow(document, &schema["items"]) } else { schema }
    }

    fn has(schema: &Value, name: &str) -> bool {
        let all = schema["allOf"].as_array().into_iter().flatten();
        !schema["properties"][name].is_null() || all.into_iter().any(|part| has(part, name))
    }

    /// Fields of E2B's requests that are refused by name: the parser knows no such field.
    const REFUSED: &[&str] = &["dnsServers", "httpsPorts", "labels"];

    #[test]
    fn it_is_what_e2bs_clients_expect() {
        let ours = api::routes().document();
        let reference: Value = serde_json::from_str(&std::fs::read_to_string(E2B).unwrap()).unwrap();
        let (mut checked, mut wrong) = (0, Vec::new());
        for (path, methods) in reference.as_object().unwrap() {
            // Parameters have other names; their places are the same.
            let shape = |path: &str| -> Vec<String> {
                path.split('/')
                    .map(|part| if part.starts_with('{') { "{}".to_owned() } else { part.to_owned() })
                    .collect()
            };
            let Some((own_path, own)) =
                ours["paths"].as_object().unwrap().iter().find(|(own, _)| shape(own) == shape(path))
            else {
                continue;
            };
            for (method, expected) in methods.as_object().unwrap() {
                let described = &own[method];
                if described.is_null() {
                    continue;
                }
                checked += 1;
                let at = format!("{method} {own_path}");
                for status in expected["statuses"].as_array().unwrap().iter().filter_map(Value::as_str) {
                    if status.starts_with('2') && described["responses"][status].is_null() {
                        wrong.push(format!("{at}: no reply {status}"));
                    }
                }
                for (status, names) in expected["replies"].as_object().unwrap() {
                    let body = body_of(&ours, &described["responses"][status]);
                    for name in names.as_array().unwrap().iter().filter_map(Value::as_str) {
                        if !has(body, name) {
                            wrong.push(format!("{at}: the reply {status} has no {name}"));
                        }
                    }
                }
                let body = body_of(&ours, &described["requestBody"]);
                for name in expected["body"].as_array().unwrap().iter().filter_map(Value::as_str) {
                    if !has(body, name) && !REFUSED.contains(&name) {
                        wrong.push(format!("{at}: the body has no {name}"));
                    }
                }
                let known: Vec<&str> = described["parameters"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .filter_map(|parameter| parameter["name"].as_str())
                    .collect();
                for name in expected["query"].as_array().unwrap().iter().filter_map(Value::as_str) {
                    if !known.contains(&name) {
                        wrong.push(format!("{at}: no parameter {name}"));
                    }
                }
            }
        }
        assert!(wrong.is_empty(), "{} of {checked} operations: {wrong:#?}", wrong.len());
        assert!(checked >= 30, "only {checked} operations are in both");
    }
}
