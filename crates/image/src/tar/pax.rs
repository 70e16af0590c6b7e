//! Extended headers: `LENGTH KEY=VALUE\n`. Of two records of one key the later counts.

use super::header::decimal;
use super::sparse::PaxSparse;
use crate::error::Refusal;

/// What of an extended header is honoured.
#[derive(Debug, Default)]
pub(super) struct Pax {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) mtime: Option<(i64, u32)>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: PaxSparse,
}

/// Records of one header.
const MAX_RECORDS: usize = 65_536;
const XATTR: &[u8] = b"SCHILY.xattr.";

/// `-1.5` is one second and a half before the epoch.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let (is_negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let mut parts = text.splitn(2, |byte| *byte == b'.');
    let seconds = i64::try_from(decimal(parts.next()?)?).ok()?;
    let mut nanos = 0;
    if let Some(fraction) = parts.next() {
        let digits = &fraction[..fraction.len().min(9)];
        if !digits.is_empty() {
            nanos = u32::try_from(decimal(digits)?).ok()? * 10_u32.pow(9 - digits.len() as u32);
        }
    }
    Some(match (is_negative, nanos) {
        (false, _) => (seconds, nanos),
        (true, 0) => (-seconds, 0),
        (true, _) => (-seconds - 1, 1_000_000_000 - nanos),
    })
}

impl Pax {
    pub(super) fn parse(mut records: &[u8]) -> Result<Self, Refusal> {
        let wrong = || Refusal::Tar("an extended header is not what it has to be");
        let mut pax = Self::default();
        let mut count = 0;
        while !records.is_empty() {
            count += 1;
            if count > MAX_RECORDS {
                let limit = MAX_RECORDS as u64;
                return Err(Refusal::Limit { what: "records of an extended header", limit });
            }
            let space = records.iter().take(20).position(|byte| *byte == b' ').ok_or_else(wrong)?;
            let length = decimal(&records[..space]).ok_or_else(wrong)?;
            let length = usize::try_from(length).ok().filter(|it| *it <= records.len()).ok_or_else(wrong)?;
            let record = records.get(space + 1..length).ok_or_else(wrong)?;
            let record = record.strip_suffix(b"\n").ok_or_else(wrong)?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(wrong)?;
            pax.set(&record[..equals], &record[equals + 1..])?;
            records = &records[length..];
        }
        Ok(pax)
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), Refusal> {
        let number =
            || decimal(value).ok_or(Refusal::Tar("an extended header has no number where one has to be"));
        match key {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = Some(number()?),
            b"uid" => self.uid = Some(number()?),
            b"gid" => self.gid = Some(number()?),
            b"mtime" => self.mtime = time(value),
            _ if key.starts_with(b"GNU.sparse.") => self.sparse.set(&key[b"GNU.sparse.".len()..], value)?,
            _ => {
                if let Some(name) = key.strip_prefix(XATTR) {
                    self.xattrs.retain(|(known, _)| known != name);
                    self.xattrs.push((name.to_vec(), value.to_vec()));
                    if self.xattrs.len() > 256 {
                        return Err(Refusal::Limit { what: "extended attributes of a file", limit: 256 });
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_fractions_and_signs() {
        for (text, expected) in [
            ("1700000000", Some((1_700_000_000, 0))),
            ("1.5", Some((1, 500_000_000))),
            ("1.1234567899", Some((1, 123_456_789))),
            ("-1.5", Some((-2, 500_000_000))),
            ("-3", Some((-3, 0))),
            ("", None),
            ("x", None),
            ("1.x", None),
            ("99999999999999999999", None),
        ] {
            assert_eq!(time(text.as_bytes()), expected, "{text}");
        }
    }

    #[test]
    fn records_that_lie_about_their_length_are_refused() {
        let pax = Pax::parse(b"9 path=a\n13 uid=70000\n9 path=b\n").unwrap();
        assert_eq!((pax.path.as_deref(), pax.uid), (Some(&b"b"[..]), Some(70_000)));
        for bad in [
            &b"8 path=a\n"[..],
            b"99 path=a\n",
            b"0 path=a\n",
            b"-9 path=a\n",
            b"9 pathxa\n",
            b"path=a\n",
            b"18446744073709551616 a=b\n",
            b"11 size=-1\n",
            b"1 ",
        ] {
            assert!(Pax::parse(bad).is_err(), "{:?}", String::from_utf8_lossy(bad));
        }
    }
}
