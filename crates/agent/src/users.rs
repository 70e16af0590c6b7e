//! Users and groups of the image, read from `/etc/passwd` and `/etc/group`.
//!
//! Who is meant may be named as in an image's USER: `name`, `uid`, and with `:` a group. An id needs no line anywhere.
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

/// The largest id. Source: runc, `libcontainer/user`.
const LARGEST: u32 = i32::MAX.cast_unsigned();

/// The user or group id that `text` is: -1 and its like mean nobody to the kernel's calls, and nothing else may be one.
pub fn id(text: &str) -> Option<u32> {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|id| is_number && *id <= LARGEST)
}

/// The line of `text` whose first field is `name`, or else the one whose third is the id `name`; of `least` fields.
fn line<'a>(text: &'a str, name: &str, least: usize) -> Option<Vec<&'a str>> {
    let lines = || text.lines().map(|line| line.split(':').collect::<Vec<_>>()).filter(|f| f.len() >= least);
    lines().find(|fields| fields[0] == name).or_else(|| {
        let id = id(name)?;
        lines().find(|fields| self::id(fields[2]) == Some(id))
    })
}

/// The id of the group that is named so, or that has that id.
fn group_id(group: &str, name: &str) -> Option<u32> {
    match line(group, name, 3) {
        Some(fields) => id(fields[2]),
        None => id(name),
    }
}

/// User and group id of the owner that is named as in `COPY --chown`: of a name without a group its own, of an id without
/// one the same number. Source: Dockerfile reference, `COPY --chown`.
pub fn owner(text: &str) -> Option<(u32, u32)> {
    owner_in(&read("/etc/passwd"), &read("/etc/group"), text)
}

fn owner_in(passwd: &str, group: &str, text: &str) -> Option<(u32, u32)> {
    let (user, named) = text.split_once(':').map_or((text, None), |(user, group)| (user, Some(group)));
    let uid = match id(user) {
        Some(uid) => uid,
        None => id(line(passwd, user, 4)?[2])?,
    };
    let gid = match (named.filter(|name| !name.is_empty()), id(user)) {
        (Some(name), _) => group_id(group, name)?,
        (None, Some(uid)) => uid,
        (None, None) => id(line(passwd, user, 4)?[3])?,
    };
    Some((uid, gid))
}

impl User {
    /// The user that is named as in an image's USER; `None` when the image has none of that name.
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

    /// Of a user without a line the group is root's and the home `/`; with a group there are no others. Source: Dockerfile
    /// reference, `USER`; runc, `GetExecUser`.
    fn parse(passwd: &str, group: &str, text: &str) -> Option<Self> {
        let (name, named) = text.split_once(':').map_or((text, None), |(user, group)| (user, Some(group)));
        let mut user = match line(passwd, name, 7) {
            Some(fields) => Self {
                name: fields[0].to_owned(),
                uid: id(fields[2])?,
                gid: id(fields[3])?,
                groups: Vec::new(),
                home: PathBuf::from(if fields[5].is_empty() { "/" } else { fields[5] }),
                shell: fields[6].to_owned(),
            },
            None => Self {
                name: name.to_owned(),
                uid: id(name)?,
                gid: 0,
                groups: Vec::new(),
                home: PathBuf::from("/"),
                shell: String::new(),
            },
        };
        if user.shell.is_empty() {
            "/bin/sh".clone_into(&mut user.shell);
        }
        if let Some(named) = named.filter(|name| !name.is_empty()) {
            user.gid = group_id(group, named)?;
            user.groups.push(user.gid);
            return Some(user);
        }
        user.groups.push(user.gid);
        for line in group.lines() {
            let entry: Vec<&str> = line.split(':').collect();
            if entry.len() >= 4
                && entry[3].split(',').any(|member| member == user.name)
                && let Ok(id) = entry[2].parse()
                && id != user.gid
            {
                user.groups.push(id);
            }
        }
        Some(user)
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

    #[test]
    fn a_user_may_be_named_as_in_an_image() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\napp:x:1001:1002::/app:\n77:x:5:6::/n:/bin/x\n";
        let group = "root:x:0:\nweb:x:33:app\napp:x:1002:\n";
        let of = |text| {
            User::parse(passwd, group, text)
                .map(|user| (user.name, user.uid, user.gid, user.groups, user.home, user.shell))
        };
        let shell = "/bin/sh".to_owned();
        let app = ("app".to_owned(), 1001, 1002, vec![1002, 33], PathBuf::from("/app"), shell.clone());
        assert_eq!(of("app"), Some(app.clone()));
        assert_eq!(of("1001"), Some(app.clone()), "by its id");
        assert_eq!(of("app:"), Some(app));
        let with = |gid| Some(("app".to_owned(), 1001, gid, vec![gid], PathBuf::from("/app"), shell.clone()));
        assert_eq!((of("app:web"), of("1001:44")), (with(33), with(44)), "the group that is named, alone");
        let nobody =
            |gid| Some(("65532".to_owned(), 65532, gid, vec![gid], PathBuf::from("/"), shell.clone()));
        assert_eq!((of("65532"), of("65532:65532")), (nobody(0), nobody(65532)), "without a line");
        assert_eq!(of("77").map(|user| user.1), Some(5), "a name wins over an id");
        for odd in ["", "none", "app:none", "-1", "+1", "4294967295", "2147483648", ":0", "1 "] {
            assert_eq!(of(odd), None, "{odd}");
        }
    }

    #[test]
    fn an_owner_is_named_as_in_copy() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\napp:x:1001:1002::/app:\n";
        let group = "web:x:33:app\n";
        let of = |text| owner_in(passwd, group, text);
        assert_eq!(
            (of("app"), of("app:web"), of("app:7")),
            (Some((1001, 1002)), Some((1001, 33)), Some((1001, 7)))
        );
        assert_eq!(
            (of("1001"), of("55"), of("55:web")),
            (Some((1001, 1001)), Some((55, 55)), Some((55, 33)))
        );
        assert_eq!((of(""), of("none"), of("app:none"), of(":33")), (None, None, None, None));
    }
}
