//! What an image says of the processes of its machines, as the builder tells the agent of it; and the agent's endpoint that
//! uploads of a build are sent to.
//!
//! The builder writes [`DEFAULTS`] into the image, as root and for nobody else to write. The agent reads it, in a guest where
//! root may have made anything of it: so it is parsed with limits, and ignored as a whole when it is odd.

use serde::{Deserialize, Serialize};

use crate::sandbox::EnvVars;

/// Where the defaults are in the image: owned by root, mode 0644.
pub const DEFAULTS: &str = "/etc/kelvin/image.json";
/// The most that they may take, in bytes.
pub const MAX_DEFAULTS: usize = 64 << 10;
/// The longest name of a user or of a working directory, in bytes. Source: Linux, `PATH_MAX`.
const MAX_TEXT: usize = 4095;

/// Header of a request to the agent that says who runs a process, as an image's USER does: `name`, `uid`, `name:group`,
/// `uid:gid`. A name without a group may be in the `Authorization` header instead, which wins.
pub const USER_HEADER: &str = "x-kelvin-user";

/// The agent's endpoint that unpacks the upload of a COPY: `POST /unpack?from=…&to=…[&owner=…][&mode=…][&workdir=…]`, the
/// body a tar, plain or gzip.
pub const UNPACK: &str = "/unpack";

/// What [`UNPACK`] answers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unpacked {
    /// Files and links that were made.
    pub files: u64,
    /// What is in the files, in bytes.
    pub bytes: u64,
}

/// What processes get that are started without it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageDefaults {
    /// Variables. Those of the sandbox and of the request win.
    #[serde(default, skip_serializing_if = "EnvVars::is_empty")]
    pub env: EnvVars,
    /// The working directory, an absolute path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workdir: Option<String>,
    /// The user: `name`, `uid`, `name:group` or `uid:gid`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// Why defaults are none.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not the JSON that is expected.
    #[error("it is not the expected JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// JSON, and no object.
    #[error("it is not a JSON object")]
    Object,
    /// Too long.
    #[error("it has {0} bytes, more than {MAX_DEFAULTS}")]
    Size(usize),
    /// A variable that no process can have.
    #[error("the name of a variable is empty, or a name has '=' or a NUL byte, or a value has one")]
    Variable,
    /// The working directory is none.
    #[error("workdir is not an absolute path")]
    Workdir,
    /// The user is none.
    #[error("user is empty, too long or has control characters")]
    User,
}

impl ImageDefaults {
    /// Reads what stands in the file.
    ///
    /// # Errors
    /// Any of [`Error`]: then nothing of it counts.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        if bytes.len() > MAX_DEFAULTS {
            return Err(Error::Size(bytes.len()));
        }
        // Lists are taken for structs.
        if bytes.trim_ascii_start().first().is_some_and(|first| *first != b'{') {
            return Err(Error::Object);
        }
        let defaults: Self = serde_json::from_slice(bytes)?;
        defaults.check()?;
        Ok(defaults)
    }

    /// What is to stand in the file.
    ///
    /// # Errors
    /// Any of [`Error`]: the agent would ignore it.
    pub fn encode(&self) -> Result<Vec<u8>, Error> {
        self.check()?;
        let bytes = serde_json::to_vec(self)?;
        if bytes.len() > MAX_DEFAULTS { Err(Error::Size(bytes.len())) } else { Ok(bytes) }
    }

    fn check(&self) -> Result<(), Error> {
        let is_odd =
            |name: &str, value: &str| name.is_empty() || name.contains(['=', '\0']) || value.contains('\0');
        if self.env.iter().any(|(name, value)| is_odd(name, value)) {
            return Err(Error::Variable);
        }
        if self
            .workdir
            .as_ref()
            .is_some_and(|path| !path.starts_with('/') || path.contains('\0') || path.len() > MAX_TEXT)
        {
            return Err(Error::Workdir);
        }
        if self
            .user
            .as_ref()
            .is_some_and(|user| user.is_empty() || user.contains(char::is_control) || user.len() > MAX_TEXT)
        {
            return Err(Error::User);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn any_bytes_are_defaults_or_an_error(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
            let _ = ImageDefaults::parse(&bytes);
        }

        #[test]
        fn what_is_encoded_is_read(
            env in proptest::collection::btree_map("[^=\\x00]{1,12}", "[^\\x00]{0,40}", 0..6),
            workdir in proptest::option::of("/[^\\x00]{0,20}"),
            user in proptest::option::of("[a-z0-9:]{1,20}"),
        ) {
            let defaults = ImageDefaults { env, workdir, user };
            let read = ImageDefaults::parse(&defaults.encode().unwrap()).unwrap();
            proptest::prop_assert_eq!(read, defaults);
        }
    }

    #[test]
    fn what_is_odd_is_refused_as_a_whole() {
        assert_eq!(ImageDefaults::parse(b"{}").unwrap(), ImageDefaults::default());
        for text in [
            "",
            "[]",
            r#"{"env":{"":"x"}}"#,
            r#"{"env":{"A=B":"x"}}"#,
            r#"{"env":{"A":"x\u0000"}}"#,
            r#"{"env":{"A":1}}"#,
            r#"{"workdir":"app"}"#,
            r#"{"workdir":""}"#,
            r#"{"user":""}"#,
            r#"{"user":"a\nb"}"#,
            r#"{"shell":"/bin/sh"}"#,
        ] {
            assert!(ImageDefaults::parse(text.as_bytes()).is_err(), "{text}");
        }
        let long = ImageDefaults {
            env: [("A".to_owned(), "x".repeat(MAX_DEFAULTS))].into(),
            ..ImageDefaults::default()
        };
        assert!(matches!(long.encode(), Err(Error::Size(_))));
        assert!(matches!(ImageDefaults::parse(&vec![b' '; MAX_DEFAULTS + 1]), Err(Error::Size(_))));
    }
}
