//! The code interpreter, by E2B's own client, and frameworks for agents. A module of its own for its name: tests begin in the order
//! of their names, and nothing runs beside the end of the one that takes longest when it begins last.

use std::path::PathBuf;
use std::process::Command;

use kelvin_api::sandbox::BakeTemplate;
use kelvin_e2e::{Ground, Server};

use super::sdk::{passes, pytest, tool};

#[tokio::test]
async fn the_code_interpreter_runs_cells() {
    let Some(ground) = Ground::with_networks().await else { return };
    let Some(python) = tool("KELVIN_E2E_PYTHON") else { return };
    // Jupyter starts in some 30 s; twice that was seen on a machine that others use too.
    let server = ground.baked("interpreter", &["--boot-deadline", "300"], 0).await;
    server.import_interpreter();
    let request = BakeTemplate::default();
    server.client().bake("code-interpreter", &request).await.expect("it can be baked");
    passes(&server, &mut pytest(&python, &["test_interpreter.py"]));
    // Here because the template takes longer to bake than they take to run.
    agents_finish(&server).await;
    server.stop().await;
}

/// Frameworks for agents with their own E2B integrations, with replies in place of a model: each makes its sandbox, gets
/// the results back into its loop, finishes and leaves nothing.
async fn agents_finish(server: &Server) {
    let Some(python) = tool("KELVIN_E2E_AGENTS") else { return };
    server.bake(1).await;
    let examples = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../examples/frameworks");
    for name in ["smolagents_agent.py", "langchain_agent.py"] {
        passes(server, Command::new(&python).arg(examples.join(name)).env("PYTHONDONTWRITEBYTECODE", "1"));
    }
    let info = server.settle().await;
    assert_eq!((info.sandboxes, info.paused), (0, 0), "nothing is left");
}
