//! What is said to Firecracker fits the API of each version: its descriptions of 1.15, 1.16 and 1.17 (the last before
//! its release) are recorded in `firecracker-api/`, as the names of commands, fields and values.

#![allow(clippy::unwrap_used)]

use std::num::NonZeroU32;
use std::path::Path;

use kelvin_api::units::{DiskMib, MemoryMib, Shape};
use kelvin_vmm::firecracker::config::{self, Call, HugePages, Options};
use kelvin_vmm::firecracker::version::Version;
use serde_json::Value;

fn description(version: &str) -> (Version, Value) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/firecracker-api/{version}.json"));
    let description: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let named = format!("Firecracker v{}", description["version"].as_str().unwrap());
    (Version::parse(&named).unwrap(), description)
}

/// Why `body` is not of `kind`.
fn problem(description: &Value, kind: &str, body: &Value) -> Option<String> {
    let definition = &description["bodies"][kind];
    let Some(fields) = definition["fields"].as_object() else { return Some(format!("no {kind}")) };
    let given = body.as_object()?;
    for name in definition["required"].as_array().unwrap() {
        if !given.contains_key(name.as_str().unwrap()) {
            return Some(format!("{kind} lacks {name}"));
        }
    }
    for (name, value) in given {
        let Some(field) = fields.get(name) else { return Some(format!("{kind} has no {name}")) };
        if let Some(values) = field["enum"].as_array() {
            if !values.contains(value) {
                return Some(format!("{name} of {kind} cannot be {value}"));
            }
            continue;
        }
        let fits = match field.as_str() {
            Some("string") => value.is_string(),
            Some("integer") => value.is_u64(),
            Some("boolean") => value.is_boolean(),
            Some(kind) if value.is_array() => {
                if let Some(why) = value.as_array()?.iter().find_map(|one| problem(description, kind, one)) {
                    return Some(why);
                }
                true
            }
            Some(kind) if value.is_object() => {
                if let Some(why) = problem(description, kind, value) {
                    return Some(why);
                }
                true
            }
            // A value that is named, such as a CPU template.
            Some(kind) => description["bodies"].get(kind).is_some(),
            None => false,
        };
        if !fits {
            return Some(format!("{name} of {kind} is {field}, not {value}"));
        }
    }
    None
}

/// Why a version does not understand `call`.
fn refusal(description: &Value, call: &Call) -> Option<String> {
    let is = |template: &str| {
        let (method, path) = template.split_once(' ').unwrap();
        let mut parts = call.path.split('/');
        let same = path.split('/').all(|part| {
            parts.next().is_some_and(|own| part == own || part.starts_with('{') && !own.is_empty())
        });
        method == call.method.as_str() && same && parts.next().is_none()
    };
    let found = description["calls"].as_object().unwrap().iter().find(|(template, _)| is(template));
    match found {
        None => Some(format!("no {} {}", call.method, call.path)),
        Some((_, Value::String(kind))) => problem(description, kind, &call.body),
        Some(_) => (!call.body.is_null()).then(|| "it takes no body".to_owned()),
    }
}

fn choices() -> Vec<Options> {
    let plain = Options::default();
    vec![
        Options { huge_pages: HugePages::Transparent, ..plain.clone() },
        Options { cpu_template: Some("T2A".to_owned()), clock_goes_on: true, ..plain.clone() },
        Options { disk_bytes_per_s: Some(1 << 20), disk_ops_per_s: NonZeroU32::new(100), ..plain.clone() },
        plain,
    ]
}

fn calls(options: &Options, version: Version) -> Vec<Call> {
    let shape = Shape { vcpus: 2, memory_mib: MemoryMib(512), disk_mib: DiskMib(1024) };
    let (memory, state) = (Path::new("memory.new"), Path::new("state.new"));
    let mut calls = Vec::new();
    for network in [false, true] {
        calls.extend(config::boot(shape, network, "quiet", options));
        calls.push(config::load_snapshot(state, network, options, version));
    }
    calls.extend([
        config::create_snapshot(memory, state, false),
        config::create_snapshot(memory, state, true),
    ]);
    calls.extend([config::patch_drive(options), config::start(), config::pause(), config::resume()]);
    calls.push(config::instance());
    calls
}

#[test]
fn every_version_that_is_used_understands_every_command() {
    for name in ["1.16.1", "1.17.0"] {
        let (version, description) = description(name);
        version.check().unwrap();
        let mut said = 0;
        for options in choices().iter().filter(|options| options.check(version).is_ok()) {
            for call in calls(options, version) {
                assert_eq!(refusal(&description, &call), None, "{name}: {call:?}");
                said += 1;
            }
        }
        assert!(said > 40, "{name}: {said} commands");
    }
}

#[test]
fn what_a_version_does_not_understand_is_not_said_to_it() {
    let (old, description_of_old) = description("1.15.1");
    assert!(old.check().unwrap_err().contains("1.15.1"));
    let (minimum, description_of_minimum) = description("1.16.1");
    let (next, _) = description("1.17.0");
    let plain = Options::default();
    let load = |version| config::load_snapshot(Path::new("state"), true, &plain, version);
    // The gate is needed: without it each of these would be refused by the VMM.
    let refused = refusal(&description_of_old, &load(minimum)).unwrap();
    assert!(refused.contains("clock_realtime") || refused.contains("vsock_override"), "{refused}");
    let refused = refusal(&description_of_minimum, &load(next)).unwrap();
    assert!(refused.contains("huge_pages"), "{refused}");
    let transparent = Options { huge_pages: HugePages::Transparent, ..plain.clone() };
    assert!(transparent.check(minimum).unwrap_err().contains("1.17"));
    assert!(transparent.check(next).is_ok());
    let unknown = Options { cpu_template: Some("T9".to_owned()), ..plain.clone() };
    assert!(unknown.check(next).unwrap_err().contains("T9"));
    assert!("2M".parse::<HugePages>().unwrap_err().contains("restored"));
}
