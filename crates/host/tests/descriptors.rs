//! The limit of descriptors of a process, lowered: in a program of its own, because a limit is all of a process's.

use std::fs::File;
use std::time::{Duration, Instant};

use kelvin_host::descriptors::{Budget, raise};
use rustix::process::{Resource, Rlimit, setrlimit};

#[test]
fn who_asks_first_is_refused_before_anybody_fails() {
    let low = Rlimit { current: Some(64), maximum: Some(256) };
    setrlimit(Resource::Nofile, low).unwrap();
    assert_eq!(raise().unwrap(), 256);
    let budget = Budget::of_process();
    let mut files = Vec::new();
    let refused = loop {
        match budget.take(1) {
            // A descriptor that was granted can be opened.
            Ok(_held) => files.push(File::open("/dev/null").unwrap()),
            Err(refused) => break refused,
        }
    };
    assert_eq!((refused.limit, refused.reserve), (256, 64));
    assert!(files.len() > 150, "{} were granted", files.len());
    // What was begun goes on: the reserve is there.
    let begun: Vec<_> = (0..50).map(|_| File::open("/dev/null").unwrap()).collect();
    drop((begun, files));
    // Closed is free, without a word to anybody.
    let since = Instant::now();
    while budget.take(100).is_err() {
        assert!(since.elapsed() < Duration::from_secs(10), "what was closed is not found");
        std::thread::yield_now();
    }
}
