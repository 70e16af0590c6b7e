//! What the guest of a fake machine does that is asked over HTTP: commands, which end at once, files, and uploads.

use bytes::Bytes;
use http::{Method, StatusCode, Uri};
use http_body_util::BodyExt;
use hyper::body::Incoming;

use super::machine::Machine;
use super::script::Exec;
use crate::Error;

/// Status, content type and body.
type Answer = (StatusCode, &'static str, Bytes);

/// Answers one request.
pub(super) async fn answer(
    machine: &Machine,
    method: &Method,
    uri: &Uri,
    body: Incoming,
) -> Result<Answer, Error> {
    let torn =
        |error: hyper::Error| Error::Io { what: "reading a request", source: std::io::Error::other(error) };
    let body = body.collect().await.map_err(torn)?.to_bytes();
    let (text, query) = (String::from_utf8_lossy(&body), uri.query().unwrap_or_default());
    let json = |exec: Exec, good: String| match exec.code {
        0 => (StatusCode::OK, "application/json", Bytes::from(good)),
        _ => {
            let message = exec.output.replace('"', "'");
            let refusal = format!(r#"{{"code":400,"message":"{message}"}}"#);
            (StatusCode::BAD_REQUEST, "application/json", Bytes::from(refusal))
        }
    };
    Ok(match (method, uri.path()) {
        (_, "/health") => (StatusCode::NO_CONTENT, "text/plain", Bytes::new()),
        (_, "/metrics") => {
            let text = r#"{"ts":1,"cpu_count":1,"cpu_used_pct":1.0,"mem_total":1,"mem_used":1,"mem_cache":1,"disk_used":1,"disk_total":1}"#;
            (StatusCode::OK, "application/json", Bytes::from_static(text.as_bytes()))
        }
        (_, "/process.Process/Start") => {
            let exec = machine.exec(&format!("run {}", command(&body)))?;
            if exec.hangs {
                return std::future::pending().await;
            }
            (StatusCode::OK, "application/connect+proto", Bytes::from(told(&exec)))
        }
        (_, "/filesystem.Filesystem/MakeDir") => {
            json(machine.exec(&format!("mkdir {text}"))?, "{}".to_owned())
        }
        (&Method::POST, "/files") => json(machine.exec(&format!("files {query} {text}"))?, "[]".to_owned()),
        (&Method::GET, "/files") => {
            let exec = machine.exec(&format!("read {query}"))?;
            (StatusCode::OK, "application/octet-stream", Bytes::from(exec.output))
        }
        (_, "/unpack") => {
            let good = format!(r#"{{"files":1,"bytes":{}}}"#, body.len());
            json(machine.exec(&format!("unpack {query} {}", body.len()))?, good)
        }
        _ => (StatusCode::NOT_FOUND, "text/plain", Bytes::new()),
    })
}

/// The fields of a message that have a length, by number. Source: Protocol Buffers, "Encoding".
fn fields(mut bytes: &[u8]) -> Vec<(u64, &[u8])> {
    fn number(bytes: &mut &[u8]) -> Option<u64> {
        let mut value = 0;
        for at in 0..10 {
            let (first, rest) = bytes.split_first()?;
            *bytes = rest;
            value |= u64::from(first & 0x7f) << (7 * at);
            if first & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }
    let mut found = Vec::new();
    while let Some(tag) = number(&mut bytes) {
        let Some(value) = number(&mut bytes) else { break };
        if tag & 7 == 2 {
            let length = usize::try_from(value).unwrap_or(usize::MAX);
            let Some((content, rest)) = bytes.split_at_checked(length) else { break };
            found.push((tag >> 3, content));
            bytes = rest;
        }
    }
    found
}

/// The last argument of the process that is to be started: what its shell is given. Source: Connect protocol, "Streaming";
/// `proto/process.proto`: `StartRequest.process` is 1, `ProcessConfig.args` is 2.
fn command(body: &[u8]) -> String {
    let message = body.get(5..).unwrap_or_default();
    let process = fields(message).into_iter().find(|(number, _)| *number == 1);
    let args = process.map(|(_, process)| fields(process)).unwrap_or_default();
    let last = args.into_iter().rev().find(|(number, _)| *number == 2);
    last.map(|(_, text)| String::from_utf8_lossy(text).into_owned()).unwrap_or_default()
}

fn field(number: u8, content: &[u8]) -> Vec<u8> {
    let mut bytes = vec![number << 3 | 2];
    let mut length = content.len();
    while length > 0x7f {
        bytes.push((length & 0x7f) as u8 | 0x80);
        length >>= 7;
    }
    bytes.push(length as u8);
    bytes.extend_from_slice(content);
    bytes
}

/// A stream of `StartResponse`: its start, what it writes, its end, and the end of the stream.
fn told(exec: &Exec) -> Vec<u8> {
    // ProcessEvent: start is 1 with its pid, data 2 with stdout in 1, end 3 with a zigzag code in 1 and `exited` in 2.
    let code = (exec.code << 1 ^ exec.code >> 31).cast_unsigned();
    let mut ended = vec![0x08];
    let mut rest = code;
    while rest > 0x7f {
        ended.push((rest & 0x7f) as u8 | 0x80);
        rest >>= 7;
    }
    ended.extend_from_slice(&[rest as u8, 0x10, 1]);
    let mut events = vec![field(1, &[0x08, 7])];
    if !exec.output.is_empty() {
        events.push(field(2, &field(1, exec.output.as_bytes())));
    }
    events.push(field(3, &ended));
    let mut stream = Vec::new();
    for event in events {
        let message = field(1, &event);
        stream.push(0);
        stream.extend_from_slice(&u32::try_from(message.len()).unwrap_or(0).to_be_bytes());
        stream.extend_from_slice(&message);
    }
    stream.extend_from_slice(&[2, 0, 0, 0, 2, b'{', b'}']);
    stream
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_found_and_its_end_is_told() {
        let process = [field(1, b"/bin/bash"), field(2, b"-c"), field(2, &[b'x'; 300])].concat();
        let message = field(1, &process);
        let body = [&[0, 0, 0, 0, 0][..], &message].concat();
        assert_eq!(command(&body), "x".repeat(300));
        assert_eq!(command(b""), "");
        let stream = told(&Exec { code: -1, output: "out".to_owned(), ..Exec::default() });
        assert!(stream.windows(3).any(|bytes| bytes == b"out"));
        // sint32 -1 is 1 on the wire.
        assert!(stream.windows(4).any(|bytes| bytes == [0x08, 1, 0x10, 1]));
    }
}
