//! Patterns: of substitutions, of sources (Go's `filepath.Match`) and of `.dockerignore`.
//!
//! All become the same tokens, and one table of positions matches them: its time is letters times tokens, whatever they are.
//!
//! Source: Go, `path/filepath/match.go`; `github.com/moby/patternmatcher`; BuildKit, `frontend/dockerfile/shell/lex.go`.

/// A part of a pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Token {
    Letter(char),
    /// Any letter but `/`.
    One,
    /// Any letter.
    Any,
    /// Any letters but `/`.
    Star,
    /// Any letters.
    All,
    /// Nothing, or any letters and a `/`.
    Deep,
    Class {
        negated: bool,
        ranges: Vec<(char, char)>,
    },
}

/// Where a match that begins at the first letter can end: for each number of letters whether so many match.
pub(crate) fn ends(tokens: &[Token], letters: &[char]) -> Vec<bool> {
    let mut now = vec![false; letters.len() + 1];
    now[0] = true;
    for token in tokens {
        if !now.contains(&true) {
            return now;
        }
        let mut next = vec![false; letters.len() + 1];
        // Whether a match could begin at this letter or before it.
        let mut begun = false;
        for at in 0..=letters.len() {
            let before = at.checked_sub(1).map(|before| (letters[before], now[before], next[before]));
            next[at] = match (token, before) {
                (Token::Star | Token::All | Token::Deep, None) => now[at],
                (_, None) => false,
                (Token::Star, Some((letter, _, went))) => now[at] || went && letter != '/',
                (Token::All, Some((_, _, went))) => now[at] || went,
                (Token::Deep, Some((letter, ..))) => now[at] || begun && letter == '/',
                (Token::Letter(wanted), Some((letter, was, _))) => was && letter == *wanted,
                (Token::One, Some((letter, was, _))) => was && letter != '/',
                (Token::Any, Some((_, was, _))) => was,
                (Token::Class { negated, ranges }, Some((letter, was, _))) => {
                    let inside = ranges.iter().any(|(low, high)| (*low..=*high).contains(&letter));
                    was && letter != '/' && inside != *negated
                }
            };
            begun |= now[at];
        }
        now = next;
    }
    now
}

/// Whether all of `text` matches.
pub(crate) fn matches(tokens: &[Token], text: &str) -> bool {
    let letters: Vec<char> = text.chars().collect();
    ends(tokens, &letters).last() == Some(&true)
}

/// The pattern of a substitution: `*` and `?` are all it has. None when it escapes what needs no escape.
pub(crate) fn of_shell(pattern: &str) -> Option<Vec<Token>> {
    let mut tokens = Vec::new();
    let mut letters = pattern.chars().peekable();
    while let Some(letter) = letters.next() {
        tokens.push(match letter {
            '*' => Token::All,
            '?' => Token::Any,
            '\\' if matches!(letters.peek(), Some('}' | '/')) => continue,
            '\\' => Token::Letter(letters.next().filter(|next| "*?\\".contains(*next))?),
            _ => Token::Letter(letter),
        });
    }
    Some(tokens)
}

/// Whether `text` has anything that a pattern is made of.
pub(crate) fn is_pattern(text: &str) -> bool {
    text.contains(['*', '?', '[', '\\'])
}

/// One component of a source's path. None when it is not valid.
pub(crate) fn of_component(pattern: &str) -> Option<Vec<Token>> {
    tokens(pattern, false)
}

/// A line of `.dockerignore`, without its `!`. None when it is not valid.
pub(crate) fn of_ignore(pattern: &str) -> Option<Vec<Token>> {
    // What stands right after `**` at the begin may be the end of a name: `**foo` has `xfoo`, as long as nothing else is special.
    if let Some(suffix) = pattern.strip_prefix("**")
        && !suffix.starts_with('/')
        && !is_pattern(suffix)
    {
        return Some([Token::All].into_iter().chain(suffix.chars().map(Token::Letter)).collect());
    }
    tokens(pattern, true)
}

fn tokens(pattern: &str, deep: bool) -> Option<Vec<Token>> {
    let mut tokens = Vec::new();
    let letters: Vec<char> = pattern.chars().collect();
    let mut at = 0;
    while let Some(letter) = letters.get(at).copied() {
        at += 1;
        match letter {
            '*' if deep && letters.get(at) == Some(&'*') => {
                at += 1;
                if letters.get(at) == Some(&'/') {
                    at += 1;
                }
                tokens.push(if at >= letters.len() { Token::All } else { Token::Deep });
            }
            '*' => tokens.push(Token::Star),
            '?' => tokens.push(Token::One),
            '\\' => {
                tokens.push(Token::Letter(*letters.get(at)?));
                at += 1;
            }
            '[' => tokens.push(class(&letters, &mut at)?),
            _ => tokens.push(Token::Letter(letter)),
        }
    }
    Some(tokens)
}

/// What comes after `[`, with the `]`.
fn class(letters: &[char], at: &mut usize) -> Option<Token> {
    let negated = letters.get(*at) == Some(&'^');
    *at += usize::from(negated);
    let mut ranges = Vec::new();
    loop {
        if letters.get(*at) == Some(&']') && !ranges.is_empty() {
            *at += 1;
            return Some(Token::Class { negated, ranges });
        }
        let low = bound(letters, at)?;
        let mut high = low;
        if letters.get(*at) == Some(&'-') {
            *at += 1;
            high = bound(letters, at)?;
        }
        ranges.push((low, high));
    }
}

fn bound(letters: &[char], at: &mut usize) -> Option<char> {
    let mut letter = *letters.get(*at)?;
    if letter == '-' || letter == ']' {
        return None;
    }
    if letter == '\\' {
        *at += 1;
        letter = *letters.get(*at)?;
    }
    *at += 1;
    Some(letter)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn components_match_as_in_go() {
        // From the table of Go's `path/filepath/match_test.go`.
        let cases = [
            ("abc", "abc", true),
            ("*", "abc", true),
            ("*c", "abc", true),
            ("a*", "abc", true),
            ("a*b*c*d*e*", "axbxcxdxexxx", true),
            ("a*b?c*x", "abxbbxdbxebxczzx", true),
            ("a*b?c*x", "abxbbxdbxebxczzy", false),
            ("ab[c]", "abc", true),
            ("ab[b-d]", "abc", true),
            ("ab[e-g]", "abc", false),
            ("ab[^c]", "abc", false),
            ("ab[^e-g]", "abc", true),
            ("a\\*b", "a*b", true),
            ("a\\*b", "ab", false),
            ("a?b", "a☺b", true),
            ("a[^a]b", "a☺b", true),
            ("[a-ζ]*", "α", true),
            ("*x", "xxx", true),
            ("[\\]a]", "]", true),
            ("[\\-x]", "-", true),
            ("[x\\-]", "z", false),
            ("a?b", "a/b", false),
            ("a*b", "a/b", false),
        ];
        for (pattern, text, expected) in cases {
            assert_eq!(matches(&of_component(pattern).unwrap(), text), expected, "{pattern} {text}");
        }
        for bad in ["[]a]", "[-]", "[x-]", "[-x]", "[a-b-c]", "[", "[^", "[^bc", "a[", "a\\"] {
            assert_eq!(of_component(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_time_is_bounded() {
        let tokens = of_component(&"a*".repeat(200)).unwrap();
        assert!(!matches(&tokens, &format!("{}b", "a".repeat(199))));
    }
}
