//! One machine: its resources, the conversation with its guest, what is frozen of it.

pub mod agent;
pub mod capture;
pub mod clock;
pub mod console;
pub mod live;
pub mod processes;
pub mod resources;
pub mod service;
pub mod text;
pub mod warm_up;
