//! Creates a sandbox, runs a command in it and ends it.
//!
//! `KELVIN_API_KEY=… cargo run --package kelvin-client --example run_command -- uname -a`; the server is at `KELVIN_API_URL`, or
//! on this machine.

use std::error::Error;
use std::io::Write;

use kelvin_api::id::Token;
use kelvin_api::sandbox::NewSandbox;
use kelvin_client::Client;
use kelvin_client::agent::Command;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let url = std::env::var("KELVIN_API_URL").unwrap_or_else(|_| "http://127.0.0.1:7400".to_owned());
    let client = Client::new(&url, Token::from_secret(std::env::var("KELVIN_API_KEY")?))?;
    let mut words = std::env::args().skip(1);
    let command = Command {
        program: words.next().unwrap_or_else(|| "uptime".to_owned()),
        args: words.collect(),
        ..Command::default()
    };

    let wanted = NewSandbox { template_id: "base".to_owned(), timeout: Some(60), ..NewSandbox::default() };
    let sandbox = client.create(&wanted, None).await?.sandbox;
    let ran = async {
        let agent = client.agent(&sandbox.sandbox_id, sandbox.envd_access_token.clone(), None)?;
        agent.run(&command, 1 << 20).await
    };
    // Whatever came of the command; a sandbox that is not ended here ends with its timeout.
    let (ran, killed) = (ran.await, client.kill(&sandbox.sandbox_id).await);

    let (code, stdout, stderr) = ran?;
    killed?;
    std::io::stdout().write_all(&stdout)?;
    std::io::stderr().write_all(&stderr)?;
    std::process::exit(code)
}
