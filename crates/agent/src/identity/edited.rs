//! What was edited of the files that say who the machine is: what is remembered of it, and what is read from it.
//! Nothing is written here.

/// What the machine's own line in `/etc/hosts` begins with.
const OWN_ADDRESS: &str = "127.0.1.1";
/// The longest host name. Source: hostname(7).
const LONGEST_NAME: usize = 64;

/// What the disk remembers of edits.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Edited {
    /// Who the machine was when they were seen.
    pub(super) name: String,
    pub(super) machine_id: String,
    /// Whether each of these is the user's.
    pub(super) hosts: bool,
    pub(super) hostname: bool,
}

impl Edited {
    pub(super) fn parse(text: &str) -> Self {
        let mut edited = Self::default();
        for line in text.lines() {
            match line.split_once(' ') {
                Some(("name", name)) => edited.name = name.to_owned(),
                Some(("machine-id", id)) => edited.machine_id = id.to_owned(),
                Some(("edited", "hosts")) => edited.hosts = true,
                Some(("edited", "hostname")) => edited.hostname = true,
                _ => {}
            }
        }
        edited
    }

    pub(super) fn text(&self) -> String {
        let mut text = format!("name {}\nmachine-id {}\n", self.name, self.machine_id);
        for (name, edited) in [("hosts", self.hosts), ("hostname", self.hostname)] {
            if edited {
                text.push_str(&format!("edited {name}\n"));
            }
        }
        text
    }
}

/// `text`, an edited `/etc/hosts`, with `name` where `former` stood on the machine's own line; the same when there is no
/// such line: then its owner wants none.
pub(super) fn renamed(text: &str, former: &str, name: &str) -> String {
    let mut result = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        let is_own = line.split_whitespace().next() == Some(OWN_ADDRESS);
        if is_own && !former.is_empty() && line.split_whitespace().any(|word| word == former) {
            let body = line.strip_suffix('\n').unwrap_or(line);
            let words: Vec<&str> =
                body.split_whitespace().map(|word| if word == former { name } else { word }).collect();
            result.push_str(&words.join(" "));
            result.push_str(&line[body.len()..]);
        } else {
            result.push_str(line);
        }
    }
    result
}

/// The host name that an edited `/etc/hostname` says, when it says one.
pub(super) fn stated(text: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(text).ok()?;
    let name = text.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with('#'))?;
    let fits = name.len() <= LONGEST_NAME
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.');
    fits.then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_has_its_own_name_in_hosts_that_were_edited() {
        let text = "127.0.0.1 localhost\n127.0.1.1 old alias\n10.0.0.1 db old\n";
        assert_eq!(
            renamed(text, "old", "new"),
            "127.0.0.1 localhost\n127.0.1.1 new alias\n10.0.0.1 db old\n"
        );
        assert_eq!(renamed("10.0.0.1 db", "old", "new"), "10.0.0.1 db", "its owner wants no such line");
        assert_eq!(renamed("127.0.1.1 x\n", "", "new"), "127.0.1.1 x\n");
    }

    #[test]
    fn a_host_name_is_read_from_what_people_write() {
        assert_eq!(stated(b"# mine\n\n build-1 \n").as_deref(), Some("build-1"));
        for text in ["", "\n", "two words", "\u{e9}", &"x".repeat(65)] {
            assert_eq!(stated(text.as_bytes()), None, "{text:?}");
        }
        assert_eq!(stated(&[0xff]), None);
    }

    #[test]
    fn edits_are_remembered() {
        let edited = Edited { name: "i1".into(), machine_id: "ab".into(), hosts: true, hostname: false };
        assert_eq!(Edited::parse(&edited.text()), edited);
        assert_eq!(Edited::parse("nonsense\nedited\n"), Edited::default());
    }
}
