//! A million entries: refused before they take more memory than an image may, and so is what comes near the limit.
//!
//! A binary of its own: the memory of a process is measured.

#![allow(clippy::unwrap_used)]

use std::io::{self, Read, Write};
use std::path::Path;

use kelvin_api::digest::sha256;
use kelvin_image::{Error, Images, Limits, Options, Refusal, Source};

/// What a process may have held at most, in all. Of it the limit of an image is 208 MiB.
const MOST: u64 = 256 << 20;

fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

fn entry(name: &str, kind: u8) -> [u8; 512] {
    let mut block = [0; 512];
    block[..name.len()].copy_from_slice(name.as_bytes());
    block[100..107].copy_from_slice(b"0000755");
    block[156] = kind;
    block[257..263].copy_from_slice(b"ustar\0");
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

/// A layout whose layer has `files` empty files and `directories` directories, written as it comes. Its digest is right when
/// anybody `looks` at it: an archive that is refused on the way is never digested to its end.
fn layout(directory: &Path, files: u64, directories: u64, looks: bool) {
    let blobs = directory.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let archive = directory.join("archive");
    let mut out = io::BufWriter::new(std::fs::File::create(&archive).unwrap());
    for number in 0..directories {
        out.write_all(&entry(&format!("d{}/{number}", number / 1000), b'5')).unwrap();
    }
    for number in 0..files {
        out.write_all(&entry(&format!("f{}/{number}", number / 1000), b'0')).unwrap();
    }
    out.write_all(&[0; 1024]).unwrap();
    drop(out);
    let mut file = std::fs::File::open(&archive).unwrap();
    let size = file.metadata().unwrap().len();
    let mut hasher = <sha2::Sha256 as sha2::Digest>::new();
    if looks {
        let mut buffer = vec![0; 1 << 20];
        loop {
            let read = file.read(&mut buffer).unwrap();
            if read == 0 {
                break;
            }
            sha2::Digest::update(&mut hasher, &buffer[..read]);
        }
    }
    let layer = kelvin_api::digest::hex(&sha2::Digest::finalize(hasher));
    std::fs::rename(&archive, blobs.join(&layer)).unwrap();
    let put = |text: &str| {
        let name = sha256(text.as_bytes());
        std::fs::write(blobs.join(&name), text).unwrap();
        format!(r#""digest":"sha256:{name}","size":{}"#, text.len())
    };
    let config = put(&format!(
        r#"{{"os":"linux","architecture":"amd64","rootfs":{{"diff_ids":["sha256:{layer}"]}}}}"#
    ));
    let manifest = put(&format!(
        r#"{{"config":{{{config}}},"layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"sha256:{layer}","size":{size}}}]}}"#
    ));
    let index = format!(r#"{{"manifests":[{{{manifest}}}]}}"#);
    std::fs::write(directory.join("index.json"), index).unwrap();
}

#[tokio::test]
async fn a_million_entries_take_no_more_than_they_may() {
    let place = tempfile::tempdir().unwrap();
    let images = Images::open(place.path().join("cache"), Options::default()).unwrap();
    // What just fits, of files and of directories, and what does not.
    for (files, directories, fits) in
        [(170_000, 0, true), (0, 34_000, true), (1_000_000, 0, false), (0, 1_000_000, false)]
    {
        let source = place.path().join("layout");
        layout(&source, files, directories, fits);
        let found = images.resolve(&Source::Layout(source.clone()), &|_| ()).await.unwrap();
        let made = images.make(&found, &place.path().join("x.ext4"), None, &|_| ()).await;
        println!("{files} files, {directories} directories: peak {} MiB, {made:?}", peak() >> 20);
        assert!(peak() <= MOST, "{} MiB", peak() >> 20);
        match (made, fits) {
            (Ok(_), true) => std::fs::remove_file(place.path().join("x.ext4")).unwrap(),
            (Err(Error::Refused { why: Refusal::Limit { what, limit }, .. }), false) => {
                assert_eq!(limit, Limits::default().memory_bytes, "{what}");
            }
            (other, _) => panic!("{files} files, {directories} directories: {other:?}"),
        }
        std::fs::remove_dir_all(&source).unwrap();
    }
}
