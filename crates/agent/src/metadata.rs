//! Metadata of files: headers `X-Metadata-KEY: VALUE` of an upload, kept as extended attributes
//! `user.e2b.KEY`. The kernel writes them; a crash between two of them leaves the earlier ones.

use std::collections::HashMap;
use std::io;
use std::path::Path;

use http::HeaderMap;
use rustix::fs::{XattrFlags, getxattr, listxattr, removexattr, setxattr};

const HEADER: &str = "x-metadata-";
const PREFIX: &str = "user.e2b.";
/// The kernel's limit for a name, less the prefix. Source: `XATTR_NAME_MAX`, envd.yaml.
const MAX_KEY: usize = 246;
/// All names and values of one file, in bytes. Source: envd.yaml.
const MAX_ALL: usize = 4096;

/// The metadata that a request asks for.
///
/// # Errors
/// A text for the caller, for what is not printable ASCII or too long.
pub fn of_headers(headers: &HeaderMap) -> Result<Vec<(String, String)>, String> {
    let mut found = Vec::new();
    let mut total = 0;
    // Of a header that stands twice the first counts: `keys` names each once, `get` gives the first.
    for name in headers.keys() {
        let Some(key) = name.as_str().strip_prefix(HEADER) else { continue };
        let value = headers.get(name).map(http::HeaderValue::as_bytes).unwrap_or_default();
        if key.is_empty() {
            return Err("a metadata key is empty".to_owned());
        }
        if key.len() > MAX_KEY {
            return Err(format!("a metadata key is longer than {MAX_KEY} bytes"));
        }
        if !value.iter().all(|byte| (0x20..=0x7e).contains(byte)) {
            return Err(format!("the value of metadata '{key}' is not printable US-ASCII"));
        }
        total += PREFIX.len() + key.len() + value.len();
        found.push((key.to_owned(), String::from_utf8_lossy(value).into_owned()));
    }
    if total > MAX_ALL {
        return Err(format!("the metadata takes {total} bytes, more than {MAX_ALL}"));
    }
    Ok(found)
}

fn names(path: &Path) -> io::Result<Vec<String>> {
    let mut buffer = vec![0_u8; 64 << 10];
    let length = listxattr(path, &mut buffer)?;
    Ok(buffer[..length]
        .split(|byte| *byte == 0)
        .filter_map(|name| std::str::from_utf8(name).ok()?.strip_prefix(PREFIX).map(str::to_owned))
        .collect())
}

/// The metadata of the file at `path`; empty when it has none or cannot have any.
pub fn read(path: &Path) -> HashMap<String, String> {
    let mut value = [0_u8; MAX_ALL];
    names(path)
        .unwrap_or_default()
        .into_iter()
        .filter_map(|key| {
            let length = getxattr(path, format!("{PREFIX}{key}"), &mut value[..]).ok()?;
            Some((key, String::from_utf8_lossy(&value[..length]).into_owned()))
        })
        .collect()
}

/// Makes `wanted` the whole metadata of the file at `path`.
///
/// # Errors
/// When the file system refuses an attribute.
pub fn replace(path: &Path, wanted: &[(String, String)]) -> io::Result<()> {
    for key in names(path).unwrap_or_default() {
        if !wanted.iter().any(|(name, _)| *name == key) {
            removexattr(path, format!("{PREFIX}{key}"))?;
        }
    }
    for (key, value) in wanted {
        setxattr(path, format!("{PREFIX}{key}"), value.as_bytes(), XattrFlags::empty())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(pairs: &[(&str, &[u8])]) -> Result<Vec<(String, String)>, String> {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(
                name.parse::<http::HeaderName>().unwrap(),
                http::HeaderValue::from_bytes(value).unwrap(),
            );
        }
        of_headers(&headers)
    }

    proptest::proptest! {
        #[test]
        fn any_metadata_is_within_its_limits(pairs in proptest::collection::vec(("[a-zA-Z-]{0,260}", ".{0,40}"), 0..20)) {
            let mut headers = HeaderMap::new();
            for (name, value) in pairs {
                let name = format!("x-metadata-{name}").parse::<http::HeaderName>();
                if let (Ok(name), Ok(value)) = (name, value.parse::<http::HeaderValue>()) {
                    headers.append(name, value);
                }
            }
            if let Ok(found) = of_headers(&headers) {
                let bytes: usize = found.iter().map(|(key, value)| key.len() + value.len()).sum();
                proptest::prop_assert!(bytes <= 4096);
            }
        }
    }

    #[test]
    fn the_first_of_two_values_counts_and_limits_hold() {
        assert_eq!(
            ask(&[("X-Metadata-Author", b"a"), ("x-metadata-author", b"b"), ("x-other", b"c")]),
            Ok(vec![("author".to_owned(), "a".to_owned())])
        );
        assert!(ask(&[("x-metadata-a", b"\xff")]).is_err());
        assert!(ask(&[(&format!("x-metadata-{}", "k".repeat(246)), b"v")]).is_ok());
        assert!(ask(&[(&format!("x-metadata-{}", "k".repeat(247)), b"v")]).is_err());
        assert!(ask(&[("x-metadata-a", &[b'v'; 4087])]).is_err());
        assert!(ask(&[("x-metadata-a", &[b'v'; 4086])]).is_ok());
    }

    #[test]
    fn attributes_are_replaced_as_a_whole() {
        let file = std::env::current_dir().unwrap().join(format!("xattr-{}", std::process::id()));
        std::fs::write(&file, "x").unwrap();
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        replace(&file, &[pair("a", "1"), pair("b", "2")]).unwrap();
        replace(&file, &[pair("b", "3")]).unwrap();
        let found = read(&file);
        std::fs::remove_file(&file).unwrap();
        assert_eq!(found, HashMap::from([pair("b", "3")]));
    }
}
