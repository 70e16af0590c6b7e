//! Users and groups of the image, read from `/etc/passwd` and `/etc/group`.
//!
//! The binary is static: the C library's look-ups would load shared objects at run time.

use std::path::{Path, PathBuf};

/// One line of `/etc/passwd`, with the groups of `/etc/group`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Login name.
    pub name: String,
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary group ids, the primary one included.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: PathBuf,
    /// Login shell.
    pub shell: String,
}

/// The most that is read of `/etc/passwd` and `/etc/group`, in bytes.
const MOST: usize = 1 << 20;

fn read(path: &str) -> String {
    crate::guest_file::read(Path::new(path), MOST)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default()
}

impl User {
    /// The user called `name`; `None` when the image has none.
    pub fn find(name: &str) -> Option<Self> {
        Self::parse(&read("/etc/passwd"), &read("/etc/group"), name)
    }

    /// Who may do everything, also in an image that names no users.
    pub fn root() -> Self {
        Self::find("root").filter(|user| user.uid == 0).unwrap_or_else(|| Self {
            name: "root".to_owned(),
            uid: 0,
            gid: 0,
            groups: vec![0],
            home: PathBuf::from("/root"),
            shell: "/bin/sh".to_owned(),
        })
    }

    fn parse(passwd: &str, group: &str, name: &str) -> Option<Self> {
        let fields: Vec<&str> = passwd
            .lines()
            .map(|line| line.split(':').collect::<Vec<_>>())
            .find(|fields| fields.len() >= 7 && fields[0] == name)?;
        let gid = fields[3].parse().ok()?;
        let mut groups = vec![gid];
        for line in group.lines() {
            let entry: Vec<&str> = line.split(':').collect();
            if entry.len() >= 4
                && entry[3].split(',').any(|member| member == name)
                && let Ok(id) = entry[2].parse()
                && id != gid
            {
                groups.push(id);
            }
        }
        Some(Self {
            name: name.to_owned(),
            uid: fields[2].parse().ok()?,
            gid,
            groups,
            home: PathBuf::from(fields[5]),
            shell: fields[6].to_owned(),
        })
    }

    /// `path` as this user means it: absolute as it is, `~` and relative ones from the home directory.
    pub fn resolve(&self, path: &str) -> PathBuf {
        match path.strip_prefix("~/") {
            Some(rest) => self.home.join(rest),
            None if path.is_empty() || path == "~" => self.home.clone(),
            None => self.home.join(Path::new(path)),
        }
    }
}

fn name_of(file: &str, id: u32) -> String {
    read(file)
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.len() >= 3 && fields[2].parse() == Ok(id))
        .map_or_else(|| id.to_string(), |fields| fields[0].to_owned())
}

/// The name of a user id, or the number as text.
pub fn user_name(uid: u32) -> String {
    name_of("/etc/passwd", uid)
}

/// The name of a group id, or the number as text.
pub fn group_name(gid: u32) -> String {
    name_of("/etc/group", gid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_has_all_its_groups_and_a_home() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\nbroken\nuser:x:1000:1000::/home/user:/bin/bash\n";
        let group = "root:x:0:\nsudo:x:27:user,other\nuser:x:1000:user\n";
        let user = User::parse(passwd, group, "user").unwrap();
        assert_eq!((user.uid, user.gid, &user.groups), (1000, 1000, &vec![1000, 27]));
        assert_eq!(user.resolve("a/b"), Path::new("/home/user/a/b"));
        assert_eq!(user.resolve("/etc"), Path::new("/etc"));
        assert_eq!(user.resolve("~/x"), Path::new("/home/user/x"));
        assert_eq!(user.resolve(""), Path::new("/home/user"));
        assert_eq!(User::parse(passwd, group, "broken"), None);
    }
}
