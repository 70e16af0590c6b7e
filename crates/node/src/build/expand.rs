//! Variables in the texts of ENV and WORKDIR: `$NAME`, `${NAME}`, `${NAME:-word}` and `${NAME:+word}`; a backslash takes the
//! meaning from the next `$`, `"`, `\` or backtick. A variable that is not set is empty.
//!
//! Source: Dockerfile reference, "Environment replacement". E2B's SDK sends texts that its server reads in the same way.

use kelvin_api::sandbox::EnvVars;

/// Bytes of what becomes of one text.
const MOST: usize = 128 << 10;
/// How deep a word may be in another.
const DEEPEST: u32 = 8;
/// What programs are looked for in, where nobody has said so. Source: `crates/agent`, `spawn::PATH`.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

type Letters<'a> = std::iter::Peekable<std::str::Chars<'a>>;

/// `text` with the variables of `env` in it.
///
/// # Errors
/// What of it is none of the forms above.
pub fn expand(text: &str, env: &EnvVars) -> Result<String, String> {
    let mut letters = text.chars().peekable();
    let expanded = word(&mut letters, env, false, 0)?;
    if expanded.contains('\0') {
        return Err("the value has a NUL".to_owned());
    }
    Ok(expanded)
}

/// Up to the end, or to the brace that ends a word in braces.
fn word(letters: &mut Letters<'_>, env: &EnvVars, in_braces: bool, depth: u32) -> Result<String, String> {
    if depth > DEEPEST {
        return Err(format!("words in braces are more than {DEEPEST} deep"));
    }
    let mut text = String::new();
    loop {
        if text.len() > MOST {
            return Err(format!("the value has more than {MOST} bytes"));
        }
        match letters.next() {
            None if in_braces => return Err("${ has no end".to_owned()),
            None => return Ok(text),
            Some('}') if in_braces => return Ok(text),
            Some('\\') => match letters.next_if(|letter| "$\"\\`}".contains(*letter)) {
                Some(letter) => text.push(letter),
                None => text.push('\\'),
            },
            Some('$') => variable(letters, env, &mut text, depth)?,
            Some(letter) => text.push(letter),
        }
    }
}

fn name(letters: &mut Letters<'_>) -> String {
    let mut name = String::new();
    while let Some(letter) = letters.next_if(|letter| {
        *letter == '_' || letter.is_ascii_alphabetic() || !name.is_empty() && letter.is_ascii_digit()
    }) {
        name.push(letter);
    }
    name
}

fn variable(letters: &mut Letters<'_>, env: &EnvVars, text: &mut String, depth: u32) -> Result<(), String> {
    let value = |name: &str| match env.get(name) {
        Some(value) => value.as_str(),
        None if name == "PATH" => PATH,
        None => "",
    };
    if letters.next_if_eq(&'{').is_none() {
        match name(letters) {
            name if name.is_empty() => text.push('$'),
            name => text.push_str(value(&name)),
        }
        return Ok(());
    }
    let name = name(letters);
    let value = value(&name);
    let unknown = || Err(format!("${{{name}…}} is none of ${{NAME}}, ${{NAME:-word}} and ${{NAME:+word}}"));
    match letters.next() {
        _ if name.is_empty() => return unknown(),
        Some('}') => text.push_str(value),
        Some(':') => {
            let kind = letters.next();
            let word = word(letters, env, true, depth + 1)?;
            match kind {
                Some('-') => text.push_str(if value.is_empty() { &word } else { value }),
                Some('+') => text.push_str(if value.is_empty() { "" } else { &word }),
                _ => return unknown(),
            }
        }
        None => return Err("${ has no end".to_owned()),
        Some(_) => return unknown(),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn env() -> EnvVars {
        [("A", "1"), ("B", "two words"), ("EMPTY", "")].map(|(a, b)| (a.to_owned(), b.to_owned())).into()
    }

    #[test]
    fn variables_are_what_they_were_set_to() {
        for (text, is) in [
            ("", ""),
            ("plain $", "plain $"),
            ("$A$B", "1two words"),
            ("${A}b", "1b"),
            ("$Ab-$1-$UNSET-", "-$1--"),
            (r"\$A \\$A \n", r"$A \1 \n"),
            ("${UNSET:-a $A}", "a 1"),
            ("${EMPTY:-x}${A:-x}", "x1"),
            ("${A:+set ${B}}${EMPTY:+set}", "set two words"),
            ("/app/bin:$PATH", "/app/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
        ] {
            assert_eq!(expand(text, &env()).unwrap(), is, "{text:?}");
        }
    }

    #[test]
    fn what_is_no_variable_is_refused() {
        let deep = "${A:+".repeat(20);
        for text in ["${", "${A", "${}", "${A:-x", "${A:?x}", "${A#x}", "${1}", "$\u{7b}A:", &deep, "\0"] {
            expand(text, &env()).unwrap_err();
        }
        let long = EnvVars::from([("L".to_owned(), "x".repeat(100_000))]);
        expand(&"$L".repeat(3), &long).unwrap_err();
    }

    proptest! {
        #[test]
        fn any_text_is_bounded(text in r"[${}:+\-\\A-C ]{0,60}") {
            if let Ok(expanded) = expand(&text, &env()) {
                prop_assert!(expanded.len() <= MOST + 64);
            }
        }
    }
}
