//! The node keeps to its contract, asked directly and over the wire: the same promises of `kelvin_node_api::testing`, each time
//! against a node over the fake driver.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use kelvin_api::id::TemplateName;
use kelvin_api::units::MemoryMib;
use kelvin_harness::client::Book;
use kelvin_harness::faults::{Faults, Plan, Scripted, What};
use kelvin_harness::world::{Broken, MEMORY, Settings, World, live, open};
use kelvin_node::Node;
use kelvin_node_api::testing::{self, Subject};
use kelvin_node_api::wire::{Remote, serve};
use kelvin_node_api::{Import, NodeService, SandboxTraffic};
use kelvin_vmm::testing::FakeDriver;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Runs `work` with a node on which nothing is.
fn with_node<F: Future<Output = ()> + Send + 'static>(work: impl FnOnce(Node) -> F + Send + 'static) {
    let world = World::make().unwrap();
    let plan = Plan { what: What::Nothing, at: 0, beside_at: u32::MAX, jitter: false, seed: 0, jump: 0 };
    let faults = Faults::new(plan, false);
    let driver = Arc::new(FakeDriver::new(Scripted(Arc::clone(&faults))));
    let (options, keys) = (world.options(Settings { warm: 0, memory: 8192 }), Arc::clone(&world.keys));
    let lived = live(&Arc::clone(&faults), async move {
        let life = open(options, driver, &faults, keys, Book::default(), 0).await?;
        work(life.node.clone()).await;
        life.server.stop().await;
        Ok::<_, Broken>(())
    });
    lived.unwrap().expect("nobody kills it").unwrap();
}

fn subject(node: Arc<dyn NodeService>, traffic: Arc<dyn SandboxTraffic>, of: &Node) -> Subject {
    let clock = of.clock().clone();
    let template: TemplateName = "base".parse().unwrap();
    // As the world has imported it.
    let file = of.data_dir().join("file");
    std::fs::write(&file, "").unwrap();
    let kernel = of.data_dir().join("file-kernel");
    std::fs::write(&kernel, kelvin_store::kernel::SMALLEST).unwrap();
    let imported = Import {
        template: template.clone(),
        rootfs: file.clone(),
        kernel,
        initrd: file,
        vcpus: 1,
        memory_mib: MemoryMib(MEMORY),
    };
    Subject { node, traffic, template, imported, now: Arc::new(move || clock.wall()) }
}

#[test]
fn a_node_in_the_same_process_keeps_the_contract() {
    with_node(|node| async move {
        testing::all(&subject(Arc::new(node.clone()), Arc::new(node.clone()), &node)).await;
    });
}

#[test]
fn a_node_over_the_wire_keeps_the_contract() {
    with_node(|node| async move {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        let stop = CancellationToken::new();
        let serving =
            tokio::spawn(serve(listener, Arc::new(node.clone()), Arc::new(node.clone()), stop.clone()));
        let remote = Remote::new(address);
        testing::all(&subject(Arc::new(remote.clone()), Arc::new(remote.clone()), &node)).await;
        drop(remote);
        stop.cancel();
        serving.await.unwrap().unwrap();
    });
}
