//! Flags of an instruction: each is asked for by name, and one that nobody asks for is refused.

use crate::error::Fault;
use crate::words::Flag;

/// The most flags of an instruction.
const MOST: usize = 64;

/// Flags that nobody has asked for yet.
pub(crate) struct Flags(Vec<Flag>);

impl Flags {
    /// What an instruction has.
    pub fn new(flags: Vec<Flag>) -> Result<Self, Fault> {
        if flags.len() > MOST {
            return Err(Fault::TooLarge { what: "an instruction in flags", limit: MOST as u64 });
        }
        for (at, flag) in flags.iter().enumerate() {
            // These alone may be there more than once.
            if !["mount", "exclude"].contains(&flag.name.as_str())
                && flags[..at].iter().any(|other| other.name == flag.name)
            {
                return Err(Fault::syntax(format!("--{} is there twice", flag.name)));
            }
        }
        Ok(Self(flags))
    }

    /// The value of `--name=value`.
    pub fn take(&mut self, name: &str) -> Result<Option<String>, Fault> {
        let Some(at) = self.0.iter().position(|flag| flag.name == name) else { return Ok(None) };
        match self.0.remove(at).value {
            Some(value) => Ok(Some(value)),
            None => Err(Fault::syntax(format!("--{name} has a value: --{name}=…"))),
        }
    }

    /// `--name` or `--name=true`.
    pub fn switch(&mut self, name: &str) -> Result<Option<bool>, Fault> {
        let Some(at) = self.0.iter().position(|flag| flag.name == name) else { return Ok(None) };
        match self.0.remove(at).value.as_deref().map(str::to_ascii_lowercase).as_deref() {
            None | Some("true") => Ok(Some(true)),
            Some("false") => Ok(Some(false)),
            Some(_) => Err(Fault::syntax(format!("--{name} is true or false"))),
        }
    }

    /// What is left is refused.
    pub fn finish(self, keyword: &str) -> Result<(), Fault> {
        match self.0.first() {
            None => Ok(()),
            Some(flag) => Err(Fault::syntax(format!("{keyword} has no flag --{}", flag.name))),
        }
    }
}
