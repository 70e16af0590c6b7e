//! The routes and their description, said once: the router serves what the OpenAPI document describes.
//!
//! Schemas are those of the types that are parsed and written (`kelvin-api`). The document is served as
//! `/openapi.json`, kept as `openapi/kelvin.json`, and compared with what E2B's own says of the same routes
//! (`openapi/e2b.json`: names and numbers, taken from its specification) by the tests here.

use std::collections::BTreeMap;

use axum::Router;
use axum::handler::Handler;
use axum::routing::{MethodFilter, MethodRouter, on};
use http::Method;
use kelvin_api::error::ApiError;
use schemars::generate::{SchemaGenerator, SchemaSettings};
use schemars::{JsonSchema, Schema};
use serde_json::{Value, json};

use crate::service::Control;

type MakeSchema = fn(&mut SchemaGenerator) -> Schema;

/// One operation, as it is described.
pub(crate) struct Operation {
    summary: &'static str,
    query: Vec<(&'static str, &'static str)>,
    body: Option<MakeSchema>,
    body_required: bool,
    replies: Vec<(u16, Option<MakeSchema>)>,
    /// The media type of a reply that comes in parts, and the schema of one.
    events: Option<(&'static str, MakeSchema)>,
    errors: &'static [u16],
    admin: bool,
}

/// An operation with this summary.
pub(crate) fn op(summary: &'static str) -> Operation {
    Operation {
        summary,
        query: Vec::new(),
        body: None,
        body_required: true,
        replies: Vec::new(),
        events: None,
        errors: &[],
        admin: false,
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

    /// The errors that are its own; those of every route are known.
    pub(crate) fn errors(mut self, errors: &'static [u16]) -> Self {
        self.errors = errors;
        self
    }
}

/// A router that knows what its routes are.
pub(crate) struct Api {
    pub(crate) router: Router<Control>,
    operations: BTreeMap<&'static str, BTreeMap<String, Operation>>,
}

impl Api {
    pub(crate) fn new() -> Self {
        Self { router: Router::new(), operations: BTreeMap::new() }
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
        let filter = MethodFilter::try_from(method.clone()).unwrap_or(MethodFilter::GET);
        let route: MethodRouter<Control> = on(filter, handler);
        self.router = self.router.route(path, route);
        self.operations.entry(path).or_default().insert(method.as_str().to_ascii_lowercase(), operation);
        self
    }

    /// These routes and those.
    pub(crate) fn merge(mut self, other: Self) -> Self {
        self.router = self.router.merge(other.router);
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

    /// The OpenAPI document.
    pub(crate) fn document(&self) -> Value {
        let mut generator = SchemaSettings::openapi3().into_generator();
        let error = schema_of::<ApiError>(&mut generator);
        let mut paths = serde_json::Map::new();
        for (path, operations) in &self.operations {
            let described: serde_json::Map<String, Value> = operations
                .iter()
                .map(|(method, operation)| {
                    (method.clone(), describe(path, operation, &mut generator, &error))
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
            "paths": paths,
            "components": {
                "schemas": schemas,
                "securitySchemes": { "ApiKey": { "type": "apiKey", "in": "header", "name": "X-API-KEY" } },
            },
        })
    }
}

fn describe(path: &str, operation: &Operation, generator: &mut SchemaGenerator, error: &Schema) -> Value {
    let content = |schema: &Schema| json!({ "application/json": { "schema": schema } });
    let mut parameters: Vec<Value> = path
        .split('/')
        .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
        .map(|name| json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } }))
        .collect();
    parameters.extend(operation.query.iter().map(|(name, what)| {
        json!({ "name": name, "in": "query", "description": what, "schema": { "type": "string" } })
    }));
    let mut replies = serde_json::Map::new();
    for (status, schema) in &operation.replies {
        let mut reply = json!({ "description": "Done." });
        if let Some(make) = schema {
            reply["content"] = content(&make(generator));
        }
        if let Some((media_type, make)) = operation.events
            && *status == 200
        {
            reply["content"][media_type] = json!({ "schema": make(generator) });
        }
        replies.insert(status.to_string(), reply);
    }
    let everywhere: &[u16] = if operation.admin { &[401, 403, 429, 500] } else { &[401, 429, 500] };
    for status in everywhere.iter().chain(operation.errors) {
        let text = http::StatusCode::from_u16(*status).ok().and_then(|status| status.canonical_reason());
        let reply = json!({ "description": text.unwrap_or("Refused"), "content": content(error) });
        replies.insert(status.to_string(), reply);
    }
    let mut described = json!({
        "summary": operation.summary,
        "parameters": parameters,
        "responses": replies,
    });
    if let Some(make) = operation.body {
        described["requestBody"] =
            json!({ "required": operation.body_required, "content": content(&make(generator)) });
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
