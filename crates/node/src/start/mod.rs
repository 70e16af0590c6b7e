//! The create path: reserve, then claim a warm machine, or a waiting VMM and load (clone), or boot (cold), activate,
//! commit. Resumes and the children of forks take the same path, from another [`source::StartSource`].
//!
//! ```text
//! reserve ──────────> vmm ────────> resume ─> activate ─> commit        warm
//! reserve ─> queue ─> vmm ─> load ─> resume ─> activate ─> commit        clone
//!       └──── slot ∥ disk ∥ vmm ─> boot ──────> activate ─> commit        cold
//! ```
//!
//! Whatever fails after `reserve` is released in reverse order before the error is returned. A crash at
//! any point leaves a record that is not `running`, and the next start reaps its machine.
//!
//! Read in this order: `source` (what is started from), `create` (reserve, and which way is taken), `claim`, `restore`, `boot`,
//! `activate`, `commit`; what they share is `attempt`.

pub mod activate;
pub mod attempt;
pub mod bake;
pub mod boot;
pub mod claim;
pub mod commit;
pub mod create;
pub mod probe;
pub mod restore;
pub mod source;
pub mod turns;
