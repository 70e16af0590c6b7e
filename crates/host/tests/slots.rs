//! Slots of a real kernel, in a network namespace that belongs to the test alone.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::time::{Duration, Instant};

use kelvin_api::network::Policy;
use kelvin_host::ledger::{Ledger, Resource};
use kelvin_host::net::{self, Options, Slots, link, netfilter, ns};

/// Runs `work` in a namespace of its own, or says why that cannot be.
fn in_namespace(work: impl AsyncFnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        if let Err(error) = ns::unshare() {
            println!("skipped: no network namespace ({error})");
            return;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            match net::check().await {
                Ok(()) => work().await,
                Err(error) => println!("skipped: {error}"),
            }
        });
    });
    thread.join().unwrap();
}

async fn slots(dir: &std::path::Path) -> (Slots, Ledger) {
    let ledger = Ledger::open(&dir.join("ledger.db")).unwrap();
    let options = Options {
        range: None,
        uplink: None,
        ready: 1,
        bandwidth_mbit: None,
        max_connections: 100,
        range_file: dir.join("range"),
    };
    (Slots::open(options, ledger.clone()).await.unwrap(), ledger)
}

#[test]
fn slots_come_and_go_and_nothing_is_left() {
    in_namespace(async || {
        let dir = tempfile::tempdir().unwrap();
        let (slots, ledger) = slots(dir.path()).await;
        let prefix = slots.range().links();
        let mut built = Vec::new();
        let mut held = Vec::new();
        for expected in 0..20 {
            let started = Instant::now();
            let slot = slots.claim().await.unwrap();
            built.push(started.elapsed());
            assert_eq!(slot.number(), expected, "lowest free first");
            assert!(slot.take_tap().is_some() && slot.take_tap().is_none());
            if expected == 7 {
                slots.release(&slot).await.unwrap();
                slots.release(&slot).await.unwrap();
                let again = slots.claim().await.unwrap();
                assert_eq!(again.number(), 7, "a number that is free again is the lowest");
                held.push(again);
            } else {
                held.push(slot);
            }
        }
        built.sort();
        println!("built on demand: p50 {:?}, slowest {:?}", built[10], built[19]);
        assert_eq!(link::names(&prefix).await.unwrap().len(), 20);
        // As after a crash: only the ledger knows.
        let (entries, _) = ledger.read().await.unwrap();
        assert_eq!(entries.len(), 20);
        for entry in entries {
            let Resource::Slot { number, .. } = entry.resource else { panic!("{entry:?}") };
            slots.remove(number, &entry.owner).await.unwrap();
        }
        assert_eq!(link::names(&prefix).await.unwrap(), Vec::<String>::new());
        assert_eq!(ledger.count().await.unwrap(), 0);
        slots.close().await.unwrap();
        assert_eq!(net::foreign_drop().await.unwrap(), None);
        let docker = "add table ip filter; add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }";
        ns::on_thread(|| net::nft::run(docker)).await.unwrap();
        assert_eq!(net::foreign_drop().await.unwrap().as_deref(), Some("ip filter FORWARD"));
        let rules = ns::on_thread(|| net::nft::run("list ruleset")).await;
        assert!(!rules.unwrap().contains("kelvin"));
    });
}

fn sum(bytes: &[u8], start: u32) -> u16 {
    let mut sum = start;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair[1]]));
    }
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

/// Bytes before the IP header: virtio-net's header and Ethernet's.
const IP: usize = 10 + 14;

/// A frame with a TCP SYN, as a guest's driver gives it to its device.
fn syn(from: Ipv4Addr, to: Ipv4Addr, port: u16) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 40, 0, 1, 0x40, 0, 64, 6, 0, 0];
    packet.extend(from.octets());
    packet.extend(to.octets());
    let check = sum(&packet, 0);
    packet[10..12].copy_from_slice(&check.to_be_bytes());
    packet.extend([0x9c, 0x40]);
    packet.extend(port.to_be_bytes());
    packet.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0]);
    let check = sum(&packet[12..], 6 + 20);
    packet[36..38].copy_from_slice(&check.to_be_bytes());
    [&[0; 10][..], &net::TAP_MAC, &net::GUEST_MAC, &[8, 0], &packet].concat()
}

#[test]
fn rules_of_a_slot_hold() {
    in_namespace(async || {
        let dir = tempfile::tempdir().unwrap();
        let (slots, _) = slots(dir.path()).await;
        let slot = slots.claim().await.unwrap();
        let log = slot.log().await.unwrap();
        assert!(slot.log().await.is_err(), "one reader");
        let mut tap = File::from(slot.take_tap().unwrap());
        let mut frame = [0; 2048];
        for (to, reason) in [
            ([169, 254, 169, 254], "metadata"),
            ([169, 254, 3, 3], "link_local"),
            ([10, 0, 0, 1], "private"),
            ([192, 168, 1, 1], "private"),
            ([10, 213, 0, 6], "sandboxes"),
            ([169, 254, 0, 22], "host"),
            ([203, 0, 113, 10], "no_uplink"),
        ] {
            tap.write_all(&syn(net::GUEST, to.into(), 443)).unwrap();
            let logged = log.next().await.unwrap();
            let found: Vec<_> = logged.iter().map(|refused| refused.reason.as_str()).collect();
            assert_eq!(found, [reason], "{to:?}");
            assert!(logged[0].target.starts_with("tcp ") && logged[0].target.ends_with(":443"), "{logged:?}");
            let size = tap.read(&mut frame).unwrap();
            assert_eq!(frame[IP + 20 + 13] & 4, 4, "a reset comes back for {to:?} ({size} bytes)");
        }
        tap.write_all(&syn([1, 2, 3, 4].into(), [203, 0, 113, 10].into(), 443)).unwrap();
        let counters = slot.counters().await.unwrap();
        assert_eq!(counters.denied["private"], 2);
        assert_eq!(counters.denied["spoofed"], 1);
        assert_eq!(counters.sent.packets, 7);
        // Rules are replaced in one step.
        let lists = (
            ["1.1.1.0/24".to_owned(), "1.1.1.7".to_owned(), "1.1.0.0/16".to_owned(), "a.com".to_owned()],
            ["0.0.0.0/0".to_owned()],
        );
        let policy = Policy::parse(&lists.0, &lists.1, None).unwrap().limited(Some(8), Some(5)).unwrap();
        slot.begin(&policy).await.unwrap();
        slot.apply(&policy).await.unwrap();
        slot.apply(&Policy::default()).await.unwrap();
        // The host's connection into the slot becomes one to the guest, and is forgotten with the slot.
        let address = slot.address();
        let caller = std::thread::spawn({
            let home = ns::current().unwrap();
            move || {
                ns::enter(std::os::fd::AsFd::as_fd(&home)).unwrap();
                TcpStream::connect_timeout(&(address, 8000).into(), Duration::from_millis(300)).is_err()
            }
        });
        assert!(tap.read(&mut frame).unwrap() > IP + 20);
        assert_eq!(frame[IP + 16..IP + 20], net::GUEST.octets());
        assert_eq!(frame[IP + 12..IP + 16], net::GUEST_GATEWAY.octets(), "guests see one and the same peer");
        assert!(caller.join().unwrap(), "nobody answered");
        drop((tap, log));
        slots.release(&slot).await.unwrap();
        let left = ns::on_thread(move || netfilter::forget(address.into())).await;
        assert_eq!(left.unwrap(), 0);
    });
}
