//! Steps as a node is asked for them, as far as the seam between the parts reaches.
//!
//! It has no command without a shell, no copy from another stage and no variables that are left for later: none comes back for
//! those. Its RUN goes through a login shell where the image has bash, whose `/etc/profile` may set PATH anew.

use kelvin_node_api::Instruction;

use crate::command::{self, quoted};
use crate::plan::{Action, Copy, CopyFrom};
use crate::upload::Upload;

/// `action` for a node, unless it is a copy: that is [`copy`] for each of its uploads.
pub fn instruction(action: &Action) -> Option<Instruction> {
    match action {
        Action::Env(pairs) => {
            let pairs = pairs.iter().map(|(name, value)| Some((name.clone(), value.literal()?.to_owned())));
            Some(Instruction::Env(pairs.collect::<Option<_>>()?))
        }
        Action::Workdir(path) => Some(Instruction::Workdir(path.literal()?.to_owned())),
        Action::User(user) => Some(Instruction::User(user.literal()?.to_owned())),
        Action::Run { argv, variables } => {
            let mut line = String::new();
            for (name, value) in variables {
                let is_name = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
                    && name.starts_with(|letter: char| !letter.is_ascii_digit());
                let value = quoted(value.literal().filter(|_| is_name)?);
                // A variable of the machine is stronger.
                line.push_str(&format!("[ -n \"${{{name}+x}}\" ] || {name}={value}; export {name}; "));
            }
            line.push_str(&command::line(argv));
            Some(Instruction::Run { command: line, user: None })
        }
        Action::Copy(_) => None,
    }
}

/// One upload of `copy` for a node.
pub fn copy(copy: &Copy, upload: &Upload) -> Option<Instruction> {
    if copy.from != CopyFrom::Context {
        return None;
    }
    let to = copy.to.literal()?.to_owned();
    let owner = Some(copy.owner.literal()?.to_owned());
    Some(Instruction::Copy {
        files: upload.hash.clone(),
        from: upload.from.clone(),
        to,
        owner,
        mode: copy.mode,
    })
}
