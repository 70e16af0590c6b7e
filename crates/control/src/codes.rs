//! Which failures a route can have: named here, once, for the document and for the check of what leaves.
//!
//! What a route has in common with all of its kind (its method, its body, its query, its path) follows from how it is
//! described (`openapi`); the rest is put together of these groups. A reply with a code that its route does not name is
//! reported ([`crate::Undocumented`]), which fails the unit tests and a case of the harness. Codes of the kinds `Internal` and
//! `Corrupt` are status 500, which every route can have, and are not named.

use kelvin_api::error::ErrorCode::{self, *};
use kelvin_api::error::Kind;

/// Codes, in groups.
pub(crate) type Codes = &'static [&'static [ErrorCode]];

/// Of every route: the caller is looked for and counted.
pub(crate) const EVERYWHERE: &[ErrorCode] = &[NoApiKey, WrongApiKey, TooManyRequests];
/// Of the routes of the server's own key.
pub(crate) const ADMIN: &[ErrorCode] = &[NotAnAdmin];
/// Of what may change something: it is written down, and may have an idempotency key.
pub(crate) const CHANGE: &[ErrorCode] =
    &[DiskFull, InvalidIdempotencyKey, IdempotencyKeyInUse, IdempotencyKeyReused, BodyTooLarge, BodyCut];
/// Of what may change something and takes no idempotency key.
pub(crate) const SECRET_CHANGE: &[ErrorCode] = &[DiskFull, InvalidIdempotencyKey, UnsupportedHeader];
/// Of a body.
pub(crate) const BODY: &[ErrorCode] = &[MalformedJson, InvalidRequest, BodyTooLarge, BodyCut];
/// Of a query.
pub(crate) const QUERY: &[ErrorCode] = &[InvalidQuery];
/// Of a path with parameters.
pub(crate) const PATH: &[ErrorCode] = &[InvalidPath];

/// Of pages.
pub(crate) const PAGES: &[ErrorCode] = &[InvalidQuery, InvalidToken];
/// Of a node that is asked.
pub(crate) const NODE: &[ErrorCode] =
    &[NodeStopping, NodeUnreachable, UnknownVersion, DescriptorsExhausted, DiskFull];
/// Of a sandbox that is named.
pub(crate) const SANDBOX: &[ErrorCode] = &[SandboxNotFound];
/// Of a sandbox that is to be changed: what it is, and who changes it already.
pub(crate) const STATE: &[ErrorCode] =
    &[SandboxRunning, SandboxPaused, SandboxAsleep, SandboxChanging, SandboxBeingAdopted, RecordUnreadable];
/// Of a machine that is started.
pub(crate) const START: &[ErrorCode] = &[
    CapacityExhausted,
    TooManyCreates,
    TooManySandboxes,
    TooMuchDisk,
    NotFound,
    SnapshotIncompatible,
    NoNetwork,
    AgentUnreachable,
    VmmUnusable,
    VmmDeadline,
];
/// Of a snapshot of a machine, whatever for.
pub(crate) const CAPTURE: &[ErrorCode] =
    &[CapacityExhausted, TooMuchDisk, OtherVmm, AgentUnreachable, VmmUnusable, VmmDeadline, NotFound];
/// Of a time to live.
pub(crate) const TIMEOUT: &[ErrorCode] = &[InvalidTimeout];
/// Of what a template's or a snapshot's name means.
pub(crate) const BASE: &[ErrorCode] =
    &[TemplateNotFound, SnapshotNotFound, TagOutdated, InvalidTag, NotFound];
/// Of labels and environments.
pub(crate) const ENVIRONMENT: &[ErrorCode] = &[InvalidEnvVar, TooLarge, SandboxExists];
/// Of rules of a network.
pub(crate) const NETWORK: &[ErrorCode] = &[InvalidNetwork, NoNetwork, UnsupportedField];

/// Whether a code is one that every route can have.
pub(crate) fn is_ours(code: ErrorCode) -> bool {
    matches!(code.kind(), Kind::Internal | Kind::Corrupt)
}
