//! Messages and what they mean, each way.

use std::collections::BTreeMap;
use std::time::Duration;

use kelvin_api::error::Failure;
use kelvin_api::id::Token;
use kelvin_api::phase::{Phase, Timings};
use kelvin_api::sandbox::{PauseMode, SandboxState, StartPath};
use kelvin_api::units::{DiskMib, MemoryMib, Shape};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::failure::{from_wire, missing, odd, to_wire};
use super::generated::pb;
use crate::{Base, Changes, Child, Create, Created, Forked, Live, Source};

/// JSON of a resource.
pub(super) fn json(value: &impl Serialize) -> Result<Vec<u8>, Failure> {
    serde_json::to_vec(value).map_err(|error| odd("a resource", &error))
}

pub(super) fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Failure> {
    serde_json::from_slice(bytes).map_err(|error| odd("a resource", &error))
}

/// A text with rules of its own: an id, a name.
pub(super) fn text<T>(text: &str) -> Result<T, Failure>
where
    T: std::str::FromStr<Err: std::fmt::Display>,
{
    text.parse().map_err(|error: T::Err| missing(&format!("a name that can be one ({error})")))
}

pub(super) fn time(at: jiff::Timestamp) -> pb::Time {
    pb::Time { seconds: at.as_second(), nanos: at.subsec_nanosecond(), ..Default::default() }
}

pub(super) fn timestamp(at: Option<pb::Time>) -> Result<jiff::Timestamp, Failure> {
    let at = at.ok_or_else(|| missing("a time"))?;
    jiff::Timestamp::new(at.seconds, at.nanos).map_err(|error| odd("a time", &error))
}

fn duration(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

pub(super) fn mode(filesystem_only: bool) -> PauseMode {
    if filesystem_only { PauseMode::Filesystem } else { PauseMode::Full }
}

pub(super) fn shape(shape: Shape) -> pb::Shape {
    pb::Shape {
        vcpus: shape.vcpus,
        memory_mib: shape.memory_mib.0,
        disk_mib: shape.disk_mib.0,
        ..Default::default()
    }
}

pub(super) fn to_shape(shape: Option<pb::Shape>) -> Result<Shape, Failure> {
    let shape = shape.ok_or_else(|| missing("a shape"))?;
    Ok(Shape {
        vcpus: shape.vcpus,
        memory_mib: MemoryMib(shape.memory_mib),
        disk_mib: DiskMib(shape.disk_mib),
    })
}

fn start_path(path: Option<StartPath>) -> buffa::EnumValue<pb::StartPath> {
    buffa::EnumValue::from(match path {
        None => pb::StartPath::START_PATH_UNSPECIFIED,
        Some(StartPath::Cold) => pb::StartPath::START_PATH_COLD,
        Some(StartPath::Clone) => pb::StartPath::START_PATH_CLONE,
        Some(StartPath::Warm) => pb::StartPath::START_PATH_WARM,
    })
}

fn to_start_path(path: buffa::EnumValue<pb::StartPath>) -> Result<Option<StartPath>, Failure> {
    match path.as_known() {
        Some(pb::StartPath::START_PATH_UNSPECIFIED) => Ok(None),
        Some(pb::StartPath::START_PATH_COLD) => Ok(Some(StartPath::Cold)),
        Some(pb::StartPath::START_PATH_CLONE) => Ok(Some(StartPath::Clone)),
        Some(pb::StartPath::START_PATH_WARM) => Ok(Some(StartPath::Warm)),
        None => Err(missing("a start path")),
    }
}

fn timings(timings: &Timings) -> Vec<pb::Timing> {
    let timing =
        |(phase, ms): (Phase, f64)| pb::Timing { phase: phase.name().to_owned(), ms, ..Default::default() };
    timings.iter().map(timing).collect()
}

fn to_timings(timings: &[pb::Timing]) -> Timings {
    let mut found = Timings::default();
    for timing in timings {
        // A phase of a later version is nothing that anybody here asks for.
        let phase = Phase::ALL.into_iter().find(|phase| phase.name() == timing.phase);
        if let (Some(phase), Ok(took)) = (phase, Duration::try_from_secs_f64(timing.ms / 1e3)) {
            found.add(phase, took);
        }
    }
    found
}

fn base(base: Base) -> pb::Base {
    use pb::__buffa::oneof::base::Base as Of;
    let base = match base {
        Base::Template(name) => Of::Template(name.to_string()),
        Base::Snapshot(id) => Of::Snapshot(id.to_string()),
    };
    pb::Base { base: Some(base), ..Default::default() }
}

fn to_base(base: pb::Base) -> Result<Base, Failure> {
    use pb::__buffa::oneof::base::Base as Of;
    match base.base {
        Some(Of::Template(name)) => Ok(Base::Template(text(&name)?)),
        Some(Of::Snapshot(id)) => Ok(Base::Snapshot(text(&id)?)),
        None => Err(missing("what it starts as")),
    }
}

fn secret(token: &Option<Token>) -> Option<String> {
    token.as_ref().map(|token| token.expose().to_owned())
}

pub(super) fn create(request: Create) -> Result<pb::CreateRequest, Failure> {
    Ok(pb::CreateRequest {
        sandbox: request.sandbox.to_string(),
        project: request.project.to_string(),
        base: base(request.base).into(),
        vcpus: request.vcpus,
        memory_mib: request.memory_mib.map(|memory| memory.0),
        env_vars: request.env_vars.into_iter().collect(),
        access_token: secret(&request.access_token),
        ends_at: time(request.ends_at).into(),
        start_path: start_path(request.start_path),
        probe_tcp: request.probe_tcp,
        network: json(&request.network)?,
        lifecycle: json(&request.lifecycle)?,
        timeout_ms: milliseconds(request.timeout),
        ..Default::default()
    })
}

pub(super) fn to_create(request: pb::CreateRequest) -> Result<Create, Failure> {
    Ok(Create {
        sandbox: text(&request.sandbox)?,
        project: text(&request.project)?,
        base: to_base(request.base.into_option().unwrap_or_default())?,
        vcpus: request.vcpus,
        memory_mib: request.memory_mib.map(MemoryMib),
        env_vars: request.env_vars.into_iter().collect(),
        access_token: request.access_token.map(Token::from_secret),
        ends_at: timestamp(request.ends_at.into_option())?,
        start_path: to_start_path(request.start_path)?,
        probe_tcp: request.probe_tcp,
        network: read(&request.network)?,
        lifecycle: read(&request.lifecycle)?,
        timeout: duration(request.timeout_ms),
    })
}

pub(super) fn created(created: &Created) -> pb::Created {
    pb::Created {
        start_path: start_path(Some(created.start_path)),
        reason: created.reason.clone(),
        timings: timings(&created.timings),
        shape: shape(created.shape).into(),
        started_at: time(created.started_at).into(),
        ..Default::default()
    }
}

pub(super) fn to_created(created: pb::Created) -> Result<Created, Failure> {
    Ok(Created {
        start_path: to_start_path(created.start_path)?.ok_or_else(|| missing("a start path"))?,
        reason: created.reason,
        timings: to_timings(&created.timings),
        shape: to_shape(created.shape.into_option())?,
        started_at: timestamp(created.started_at.into_option())?,
    })
}

pub(super) fn source(source: Option<Source>) -> pb::SourceResponse {
    match source {
        None => pb::SourceResponse::default(),
        Some(source) => pb::SourceResponse {
            base: base(source.base).into(),
            shape: shape(source.shape).into(),
            ..Default::default()
        },
    }
}

pub(super) fn to_source(source: pb::SourceResponse) -> Result<Option<Source>, Failure> {
    let Some(base) = source.base.into_option() else {
        return Ok(None);
    };
    Ok(Some(Source { base: to_base(base)?, shape: to_shape(source.shape.into_option())? }))
}

pub(super) fn child(child: Child) -> pb::Child {
    pb::Child {
        sandbox: child.sandbox.to_string(),
        project: child.project.to_string(),
        access_token: secret(&child.access_token),
        traffic_token: secret(&child.traffic_token),
        env_vars: child.env_vars.into_iter().collect(),
        ends_at: time(child.ends_at).into(),
        timeout_ms: milliseconds(child.timeout),
        ..Default::default()
    }
}

pub(super) fn to_child(child: pb::Child) -> Result<Child, Failure> {
    Ok(Child {
        sandbox: text(&child.sandbox)?,
        project: text(&child.project)?,
        access_token: child.access_token.map(Token::from_secret),
        traffic_token: child.traffic_token.map(Token::from_secret),
        env_vars: child.env_vars.into_iter().collect(),
        ends_at: timestamp(child.ends_at.into_option())?,
        timeout: duration(child.timeout_ms),
    })
}

pub(super) fn forked(forked: Forked) -> Result<pb::ForkResponse, Failure> {
    use pb::__buffa::oneof::forked::Outcome;
    let children = forked.children.into_iter().map(|child| {
        let outcome = match child {
            Ok(child) => Outcome::Created(Box::new(created(&child))),
            Err(failure) => Outcome::Failure(Box::new(to_wire(failure))),
        };
        pb::Forked { outcome: Some(outcome), ..Default::default() }
    });
    Ok(pb::ForkResponse {
        children: children.collect(),
        capture: json(&forked.capture)?,
        timings: timings(&forked.timings),
        ..Default::default()
    })
}

pub(super) fn to_forked(forked: pb::ForkResponse) -> Result<Forked, Failure> {
    use pb::__buffa::oneof::forked::Outcome;
    let children = forked.children.into_iter().map(|child| match child.outcome {
        Some(Outcome::Created(child)) => Ok(Ok(to_created(*child)?)),
        Some(Outcome::Failure(failure)) => Ok(Err(from_wire(*failure))),
        None => Err(missing("what became of a child")),
    });
    Ok(Forked {
        capture: read(&forked.capture)?,
        timings: to_timings(&forked.timings),
        children: children.collect::<Result<_, Failure>>()?,
    })
}

pub(super) fn live(live: &Live) -> pb::LiveSandbox {
    pb::LiveSandbox {
        sandbox: live.sandbox.to_string(),
        ends_at: time(live.ends_at).into(),
        shape: shape(live.shape).into(),
        start_path: start_path(Some(live.start_path)),
        started_at: time(live.started_at).into(),
        paused: live.state == SandboxState::Paused,
        generation: live.generation,
        ..Default::default()
    }
}

pub(super) fn to_live(live: pb::LiveSandbox) -> Result<Live, Failure> {
    Ok(Live {
        sandbox: text(&live.sandbox)?,
        ends_at: timestamp(live.ends_at.into_option())?,
        shape: to_shape(live.shape.into_option())?,
        start_path: to_start_path(live.start_path)?.ok_or_else(|| missing("a start path"))?,
        started_at: timestamp(live.started_at.into_option())?,
        state: if live.paused { SandboxState::Paused } else { SandboxState::Running },
        generation: live.generation,
    })
}

pub(super) fn changes(changes: Changes) -> pb::ChangesResponse {
    pb::ChangesResponse {
        generation: changes.generation,
        ended: changes.ended.into_iter().map(|(id, reason)| (id.to_string(), reason)).collect(),
        changed: changes.changed.values().map(live).collect(),
        resync: changes.resync,
        ..Default::default()
    }
}

pub(super) fn to_changes(changes: pb::ChangesResponse) -> Result<Changes, Failure> {
    let mut ended = BTreeMap::new();
    for (id, reason) in changes.ended {
        ended.insert(text(&id)?, reason);
    }
    let mut changed = BTreeMap::new();
    for live in changes.changed {
        let live = to_live(live)?;
        changed.insert(live.sandbox.clone(), live);
    }
    Ok(Changes { generation: changes.generation, ended, changed, resync: changes.resync })
}
