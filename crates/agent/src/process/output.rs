//! The output of one process on its way to its clients: a queue for each, and a backlog while there is none.

use std::collections::VecDeque;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kelvin_api::envd::process::__buffa::oneof::process_event::{Event, data_event::Output};
use kelvin_api::envd::process::{ProcessEvent, process_event};
use rustix::process::WaitIdStatus;
use tokio::sync::mpsc;

/// Output kept while nobody is attached, in bytes.
const BACKLOG: usize = 1 << 20;

/// Chunks on their way to one client.
const QUEUE: usize = 8;

/// What a client is told of a process, one after the other.
#[derive(Debug, Clone)]
pub(super) enum Chunk {
    Stdout(Vec<u8>),
    Stderr(Vec<u8>),
    Pty(Vec<u8>),
    End { exit_code: i32, exited: bool, status: String, error: Option<String> },
}

impl Chunk {
    fn size(&self) -> usize {
        match self {
            Self::Stdout(bytes) | Self::Stderr(bytes) | Self::Pty(bytes) => bytes.len(),
            Self::End { .. } => 0,
        }
    }

    pub(super) fn event(self) -> ProcessEvent {
        let event = match self {
            Self::Stdout(bytes) => data(Output::Stdout(bytes)),
            Self::Stderr(bytes) => data(Output::Stderr(bytes)),
            Self::Pty(bytes) => data(Output::Pty(bytes)),
            Self::End { exit_code, exited, status, error } => Event::End(Box::new(process_event::EndEvent {
                exit_code,
                exited,
                status,
                error,
                ..Default::default()
            })),
        };
        ProcessEvent { event: Some(event), ..Default::default() }
    }
}

fn data(output: Output) -> Event {
    Event::Data(Box::new(process_event::DataEvent { output: Some(output), ..Default::default() }))
}

#[derive(Debug, Default)]
struct HubState {
    clients: Vec<mpsc::Sender<Chunk>>,
    backlog: VecDeque<Chunk>,
    backlog_bytes: usize,
}

/// Spreads the output of one process over its clients.
#[derive(Debug, Default)]
pub(super) struct Hub {
    state: Mutex<HubState>,
    attached: tokio::sync::Notify,
}

impl Hub {
    fn lock(&self) -> MutexGuard<'_, HubState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new client; what nobody has seen comes first.
    pub(super) fn attach(&self) -> (Vec<Chunk>, mpsc::Receiver<Chunk>) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let mut state = self.lock();
        state.clients.push(sender);
        state.backlog_bytes = 0;
        self.attached.notify_one();
        (state.backlog.drain(..).collect(), receiver)
    }

    /// Waits until somebody has taken the backlog.
    pub(super) async fn collected(&self) {
        while !self.lock().backlog.is_empty() {
            self.attached.notified().await;
        }
    }

    /// Delivers to every client, waiting for the slow ones; keeps it when there is none.
    pub(super) async fn push(&self, chunk: Chunk) {
        let clients = self.lock().clients.clone();
        let mut delivered = false;
        for client in clients {
            delivered |= client.send(chunk.clone()).await.is_ok();
        }
        let mut state = self.lock();
        state.clients.retain(|client| !client.is_closed());
        if !delivered {
            state.backlog_bytes += chunk.size();
            state.backlog.push_back(chunk);
            while state.backlog_bytes > BACKLOG {
                let Some(dropped) = state.backlog.pop_front() else {
                    break;
                };
                state.backlog_bytes -= dropped.size();
            }
        }
    }
}

pub(super) fn end_of(status: io::Result<WaitIdStatus>) -> Chunk {
    match status {
        Ok(status) => match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => {
                let status = format!("exit status {code}");
                let error = (code != 0).then(|| status.clone());
                Chunk::End { exit_code: code, exited: true, status, error }
            }
            (None, signal) => {
                let text = kelvin_api::signal::status(signal.unwrap_or(0), status.dumped());
                Chunk::End { exit_code: -1, exited: false, status: text.clone(), error: Some(text) }
            }
        },
        Err(error) => Chunk::End {
            exit_code: -1,
            exited: false,
            status: "unknown".to_owned(),
            error: Some(error.to_string()),
        },
    }
}
