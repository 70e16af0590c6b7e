//! `kelvin sandbox network|forward|proxy`, and the network of a create.

use std::net::{IpAddr, SocketAddr};

use kelvin_api::network::{NetworkConfig, NetworkUpdate, NewNetwork, Word};
use kelvin_client::Client;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::args::{EgressArgs, MachineArgs, Output};
use crate::output::{Failed, line, network_state_table, print};

fn some(list: &[String]) -> Option<Vec<String>> {
    (!list.is_empty()).then(|| list.to_vec())
}

/// The network that a create asks for.
pub fn of(machine: &MachineArgs) -> Option<NewNetwork> {
    if machine.no_network {
        return Some(NewNetwork::Word(Word::None));
    }
    let config = NetworkConfig {
        allow_public_traffic: machine.private_ports.then_some(false),
        allow_out: some(&machine.egress.allow_out),
        deny_out: some(&machine.egress.deny_out),
        mask_request_host: machine.mask_host.clone(),
        bandwidth_mbit: machine.egress.bandwidth,
        max_connections: machine.egress.max_connections,
        ..NetworkConfig::default()
    };
    (config != NetworkConfig::default()).then(|| NewNetwork::Config(Box::new(config)))
}

/// `kelvin sandbox network`.
pub async fn show_or_set(
    client: &Client,
    output: Output,
    id: &str,
    egress: EgressArgs,
    open: bool,
) -> Result<(), Failed> {
    let update = NetworkUpdate {
        allow_out: some(&egress.allow_out),
        deny_out: some(&egress.deny_out),
        allow_internet_access: egress.no_internet.then_some(false),
        bandwidth_mbit: egress.bandwidth,
        max_connections: egress.max_connections,
        ..NetworkUpdate::default()
    };
    if open || update != NetworkUpdate::default() {
        client.set_network(id, &update).await?;
    }
    print(output, &client.network(id).await?, network_state_table);
    Ok(())
}

fn ports(text: &str) -> Result<(u16, u16), Failed> {
    let wrong = || Failed::new(format!("{text:?} is not LOCAL[:REMOTE]"), "for example 8080 or 8080:80");
    let (local, remote) = text.split_once(':').unwrap_or((text, text));
    let (local, remote) = (local.parse().map_err(|_| wrong())?, remote.parse().map_err(|_| wrong())?);
    if remote == 0 { Err(wrong()) } else { Ok((local, remote)) }
}

/// `kelvin sandbox forward`: until interrupted.
pub async fn forward(client: &Client, id: &str, wanted: &[String], listen: IpAddr) -> Result<(), Failed> {
    let sandbox = client.sandbox(id).await?;
    let mut listeners = JoinSet::new();
    for text in wanted {
        let (local, remote) = ports(text)?;
        let address = SocketAddr::from((listen, local));
        let listener = TcpListener::bind(address).await.map_err(|error| {
            Failed::new(format!("{address}: {error}"), "choose another local port, or 0 for a free one")
        })?;
        let bound = listener.local_addr().map_err(|error| Failed::other(&error))?;
        line(&format!("{bound} -> {}:{remote}", sandbox.sandbox_id));
        let (client, sandbox) = (client.clone(), sandbox.clone());
        listeners.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut stream, from)) = listener.accept().await {
                let (client, sandbox) = (client.clone(), sandbox.clone());
                connections.spawn(async move {
                    let joined = async {
                        let mut remote = client.stream(&sandbox, remote).await?;
                        tokio::io::copy_bidirectional(&mut stream, &mut remote).await.map_err(|source| {
                            kelvin_client::Error::Local { what: format!("forwarding for {from}"), source }
                        })
                    };
                    if let Err(error) = joined.await {
                        Failed::from(error).print();
                    }
                });
                while connections.try_join_next().is_some() {}
            }
        });
    }
    tokio::select! {
        _ = listeners.join_next() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
    Ok(())
}

/// `kelvin sandbox proxy`: ends when the sandbox's side has.
pub async fn proxy(client: &Client, id: &str, port: u16) -> Result<(), Failed> {
    let sandbox = client.sandbox(id).await?;
    let stream = client.stream(&sandbox, port).await?;
    join(stream).await.map_err(|error| Failed::other(&error))
}

async fn join(stream: impl AsyncRead + AsyncWrite) -> std::io::Result<()> {
    let (mut from, mut to) = tokio::io::split(stream);
    let inward = async {
        tokio::io::copy(&mut tokio::io::stdin(), &mut to).await?;
        // The other side may still have something to say after our end.
        tokio::io::AsyncWriteExt::shutdown(&mut to).await?;
        std::future::pending().await
    };
    let mut stdout = tokio::io::stdout();
    let outward = async {
        tokio::io::copy(&mut from, &mut stdout).await?;
        tokio::io::AsyncWriteExt::flush(&mut stdout).await
    };
    tokio::select! {
        result = inward => result,
        result = outward => result,
    }
}
