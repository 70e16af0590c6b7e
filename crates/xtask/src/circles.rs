//! Circles of files: inside a crate, files import each other in one direction.
//!
//! What counts is what a file names: `use` trees, and paths in code that begin with `crate`, `super`, `self` or a module
//! that the file declares. A name that a file only passes on (`pub use`) counts as of the file where it is from. Tests may
//! name anything. Not seen: methods, which are called without naming where they are; names that macros put together.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::{Result, files as fs};

/// How often a name is followed through files that pass it on.
const FOLLOWED: u32 = 16;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Word(String),
    /// `::`
    Of,
    Sign(char),
}

fn skip_string(text: &[char], mut at: usize) -> usize {
    while at < text.len() && text[at] != '"' {
        at += if text[at] == '\\' { 2 } else { 1 };
    }
    at + 1
}

/// Whether a raw string begins after `word`, and where it ends.
fn skip_raw_string(text: &[char], word: &str, at: usize) -> Option<usize> {
    if !matches!(word, "r" | "br" | "cr") {
        return None;
    }
    let hashes = text[at..].iter().take_while(|sign| **sign == '#').count();
    if text.get(at + hashes) != Some(&'"') {
        return None;
    }
    let end: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
    let inside = at + hashes + 1;
    let length = text[inside..].windows(end.len()).position(|window| window == end)?;
    Some(inside + length + end.len())
}

fn skip_comment(text: &[char], mut at: usize) -> usize {
    if text[at + 1] == '/' {
        return at + text[at..].iter().take_while(|sign| **sign != '\n').count();
    }
    let mut depth = 0;
    while at < text.len() {
        match (text[at], text.get(at + 1)) {
            ('/', Some('*')) => depth += 1,
            ('*', Some('/')) => depth -= 1,
            _ => {
                at += 1;
                continue;
            }
        }
        at += 2;
        if depth == 0 {
            break;
        }
    }
    at
}

fn tokens(text: &str) -> Vec<Token> {
    let text: Vec<char> = text.chars().collect();
    let is_word = |sign: &char| sign.is_alphanumeric() || *sign == '_';
    let (mut found, mut at) = (Vec::new(), 0);
    while at < text.len() {
        match (text[at], text.get(at + 1)) {
            ('/', Some('/' | '*')) => at = skip_comment(&text, at),
            ('"', _) => at = skip_string(&text, at + 1),
            // A character, or the name of a lifetime.
            ('\'', Some('\\')) => {
                at += 3 + text[at + 3..].iter().take_while(|sign| **sign != '\'').count() + 1
            }
            ('\'', _) if text.get(at + 2) == Some(&'\'') => at += 3,
            ('\'', _) => at += 1 + text[at + 1..].iter().take_while(|sign| is_word(sign)).count(),
            (':', Some(':')) => {
                found.push(Token::Of);
                at += 2;
            }
            (sign, _) if is_word(&sign) => {
                let word: String = text[at..].iter().take_while(|sign| is_word(sign)).collect();
                at += word.chars().count();
                match skip_raw_string(&text, &word, at) {
                    Some(end) => at = end,
                    None => found.push(Token::Word(word)),
                }
            }
            (sign, _) => {
                if !sign.is_whitespace() {
                    found.push(Token::Sign(sign));
                }
                at += 1;
            }
        }
    }
    found
}

/// A path of names.
type Names = Vec<String>;

/// What one file names.
#[derive(Debug, Default)]
struct Named {
    /// By whole path, from the crate's root.
    paths: Vec<Names>,
    /// What `use` makes known under a name, in which module of the file.
    known: BTreeMap<(Names, String), Names>,
}

struct Parser<'a> {
    tokens: &'a [Token],
    at: usize,
    /// The module that is read, with the modules inside the file.
    module: Names,
    /// How many braces are open, and at how many the modules inside the file began.
    depth: usize,
    inside: Vec<usize>,
    /// Modules that are files.
    files: &'a BTreeMap<Names, String>,
    named: Named,
}

impl Parser<'_> {
    fn token(&self, ahead: usize) -> Option<&Token> {
        self.tokens.get(self.at + ahead)
    }

    fn is(&self, ahead: usize, sign: char) -> bool {
        self.token(ahead) == Some(&Token::Sign(sign))
    }

    fn word(&self, ahead: usize) -> Option<&str> {
        match self.token(ahead) {
            Some(Token::Word(word)) => Some(word),
            _ => None,
        }
    }

    /// `path` from the root; none when it is of another crate, or of nothing that is a module.
    fn absolute(&self, path: &[String]) -> Option<Names> {
        let mut base = self.module.clone();
        let mut rest = path;
        match path.first()?.as_str() {
            "crate" => {
                base.clear();
                rest = &path[1..];
            }
            "self" => rest = &path[1..],
            "super" => {}
            first => {
                base.push(first.to_owned());
                return self.files.contains_key(&base).then(|| [&self.module, path].concat());
            }
        }
        while let Some((first, more)) = rest.split_first()
            && first == "super"
        {
            base.pop()?;
            rest = more;
        }
        base.extend_from_slice(rest);
        Some(base)
    }

    fn run(mut self) -> Named {
        while self.at < self.tokens.len() {
            if self.is(0, '#')
                && self.is(1, '[')
                && self.word(2) == Some("cfg")
                && self.word(4) == Some("test")
            {
                self.skip_item();
                continue;
            }
            match self.token(0) {
                Some(Token::Sign('{')) => self.depth += 1,
                Some(Token::Sign('}')) => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.inside.last() == Some(&self.depth) {
                        self.inside.pop();
                        self.module.pop();
                    }
                }
                Some(Token::Word(word)) if word == "mod" && self.is(2, '{') => {
                    self.module.extend(self.word(1).map(str::to_owned));
                    self.inside.push(self.depth);
                    self.depth += 1;
                    self.at += 3;
                    continue;
                }
                Some(Token::Word(word)) if word == "use" && !self.is(1, '<') => {
                    self.at += 1;
                    self.tree(&Vec::new());
                    continue;
                }
                Some(Token::Word(_)) => {
                    self.path();
                    continue;
                }
                _ => {}
            }
            self.at += 1;
        }
        self.named
    }

    /// Passes over what an attribute belongs to.
    fn skip_item(&mut self) {
        let mut depth = 0_usize;
        while let Some(token) = self.token(0).cloned() {
            self.at += 1;
            match token {
                Token::Sign('{') => depth += 1,
                Token::Sign('}') => {
                    depth = depth.saturating_sub(1);
                    if depth == 0 {
                        return;
                    }
                }
                Token::Sign(';') if depth == 0 => return,
                _ => {}
            }
        }
    }

    /// A path in code.
    fn path(&mut self) {
        let of_item = self.at > 0 && self.tokens[self.at - 1] == Token::Of;
        // `pub(in crate::x)`.
        let is_visibility = self.at > 1
            && self.tokens[self.at - 1] == Token::Word("in".to_owned())
            && self.tokens[self.at - 2] == Token::Sign('(');
        let mut path = Names::new();
        while let Some(word) = self.word(0) {
            path.push(word.to_owned());
            self.at += 1;
            if self.token(0) != Some(&Token::Of) {
                break;
            }
            self.at += 1;
        }
        if path.len() > 1 && !of_item && !is_visibility {
            let absolute = self.absolute(&path);
            self.named.paths.extend(absolute);
        }
    }

    /// What is left of a `use` tree below `prefix`; up to its end, or the comma or brace after it.
    fn tree(&mut self, prefix: &Names) {
        let mut path = prefix.clone();
        loop {
            match self.token(0).cloned() {
                Some(Token::Word(word)) if word == "as" => {
                    let name = self.word(1).unwrap_or("_").to_owned();
                    self.at += 2;
                    return self.leaf(&path, Some(name));
                }
                Some(Token::Word(word)) => path.push(word),
                Some(Token::Of) => {}
                Some(Token::Sign('{')) => {
                    self.at += 1;
                    while self.token(0).is_some() && !self.is(0, '}') {
                        self.tree(&path);
                        if self.is(0, ',') {
                            self.at += 1;
                        }
                    }
                    self.at += 1;
                    return;
                }
                Some(Token::Sign('*')) => {
                    self.at += 1;
                    return self.leaf(&path, None);
                }
                _ => {
                    let name = path.last().cloned();
                    return self.leaf(&path, name);
                }
            }
            self.at += 1;
        }
    }

    fn leaf(&mut self, path: &[String], name: Option<String>) {
        let (path, name) = match path {
            [before @ .., last] if last == "self" && !before.is_empty() => {
                (before, if name.as_deref() == Some("self") { before.last().cloned() } else { name })
            }
            _ => (path, name),
        };
        let Some(absolute) = self.absolute(path) else { return };
        if let Some(name) = name {
            self.named.known.insert((self.module.clone(), name), absolute.clone());
        }
        self.named.paths.push(absolute);
    }
}

/// Which module a file is, by its path below `src`.
fn module_of(file: &str) -> Names {
    let mut names: Names = file.trim_end_matches(".rs").split('/').map(str::to_owned).collect();
    if names.last().is_some_and(|last| last == "mod") || file == "lib.rs" || file == "main.rs" {
        names.pop();
    }
    names
}

/// Which file imports which, by their paths below `src`. `sources`: what is in each.
fn imports(sources: &BTreeMap<String, String>) -> BTreeMap<String, BTreeSet<String>> {
    let mut files = BTreeMap::new();
    for file in sources.keys() {
        // A program beside a library is a crate of its own.
        if file != "main.rs" || !sources.contains_key("lib.rs") {
            files.insert(module_of(file), file.clone());
        }
    }
    let named: BTreeMap<&String, Named> = files
        .iter()
        .map(|(module, file)| {
            let tokens = tokens(&sources[file]);
            let parser = Parser {
                tokens: &tokens,
                at: 0,
                module: module.clone(),
                depth: 0,
                inside: Vec::new(),
                files: &files,
                named: Named::default(),
            };
            (file, parser.run())
        })
        .collect();
    let home = |path: &Names| -> Option<String> {
        let mut path = path.clone();
        for _ in 0..FOLLOWED {
            let (module, file) =
                (0..=path.len()).rev().find_map(|length| files.get_key_value(&path[..length]))?;
            let passed_on = path
                .get(module.len())
                .and_then(|name| named[file].known.get(&(module.clone(), name.clone())));
            match passed_on {
                Some(target) => path = [target, &path[module.len() + 1..]].concat(),
                None => return Some(file.clone()),
            }
        }
        None
    };
    named
        .iter()
        .map(|(file, named)| {
            let mut imported: BTreeSet<String> = named.paths.iter().filter_map(home).collect();
            imported.remove(*file);
            ((*file).clone(), imported)
        })
        .collect()
}

/// The shortest way from `file` back to itself.
fn way_back(imports: &BTreeMap<String, BTreeSet<String>>, file: &str) -> Option<Vec<String>> {
    let (mut seen, mut ways) = (BTreeSet::new(), vec![vec![file.to_owned()]]);
    while !ways.is_empty() {
        let mut longer = Vec::new();
        for way in ways {
            for next in way.last().and_then(|last| imports.get(last)).into_iter().flatten() {
                let way: Vec<String> = way.iter().chain([next]).cloned().collect();
                if next == file {
                    return Some(way);
                }
                if seen.insert(next.clone()) {
                    longer.push(way);
                }
            }
        }
        ways = longer;
    }
    None
}

/// Each circle: its files, and one way round.
fn circles(imports: &BTreeMap<String, BTreeSet<String>>) -> Vec<(BTreeSet<String>, Vec<String>)> {
    let reached = |from: &String| {
        let (mut seen, mut todo) = (BTreeSet::new(), vec![from]);
        while let Some(file) = todo.pop() {
            todo.extend(imports.get(file).into_iter().flatten().filter(|next| seen.insert((*next).clone())));
        }
        seen
    };
    let reached: BTreeMap<&String, BTreeSet<String>> =
        imports.keys().map(|file| (file, reached(file))).collect();
    let (mut found, mut told) = (Vec::new(), BTreeSet::new());
    for (file, others) in &reached {
        let round: BTreeSet<String> =
            others.iter().filter(|other| reached[other].contains(*file)).cloned().collect();
        if round.contains(*file) && told.insert((*file).clone()) {
            told.extend(round.iter().cloned());
            found.extend(way_back(imports, file).map(|way| (round, way)));
        }
    }
    found
}

fn read(directory: &Path, below: &str, into: &mut BTreeMap<String, String>) -> Result<()> {
    for path in fs::list(directory)? {
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        let name = format!("{below}{name}");
        if path.is_dir() {
            read(&path, &format!("{name}/"), into)?;
        } else if name.ends_with(".rs") {
            into.insert(name, fs::read_to_string(&path)?);
        }
    }
    Ok(())
}

/// A circle of a crate.
pub struct Circle {
    /// How many files it has.
    pub files: usize,
    /// One way round, and all of its files.
    pub shown: String,
}

/// The circles of the crate in `directory`.
pub fn of_crate(directory: &Path) -> Result<Vec<Circle>> {
    let mut sources = BTreeMap::new();
    read(&directory.join("src"), "", &mut sources)?;
    let name = directory.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let circle = |(files, way): (BTreeSet<String>, Vec<String>)| {
        let all: Vec<String> = files.into_iter().collect();
        let (round, files) = (way.join(" -> "), all.len());
        Circle { files, shown: format!("{name}: a circle of {files} files: {round} ({})", all.join(", ")) }
    };
    Ok(circles(&imports(&sources)).into_iter().map(circle).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(sources: &[(&str, &str)]) -> BTreeMap<String, BTreeSet<String>> {
        imports(&sources.iter().map(|(file, text)| ((*file).to_owned(), (*text).to_owned())).collect())
    }

    fn edges(found: &BTreeMap<String, BTreeSet<String>>, file: &str) -> Vec<String> {
        found[file].iter().cloned().collect()
    }

    #[test]
    fn use_trees_and_paths_are_followed_to_their_files() {
        let found = of(&[
            ("lib.rs", "mod a; mod b; mod c;\npub use a::Thing;\nfn f() { c::deep::g::<u8>() }"),
            ("a.rs", "pub struct Thing;"),
            ("b.rs", "use crate::{Thing as T, c::{self, deep::{g, h}}};\nuse std::fmt::Display;"),
            ("c/mod.rs", "pub mod deep;"),
            ("c/deep.rs", "fn g() { let x = super::super::b::y; } fn h() -> crate::a::Thing { }"),
        ]);
        assert_eq!(edges(&found, "lib.rs"), ["a.rs", "c/deep.rs"]);
        // `Thing` is only passed on by lib.rs.
        assert_eq!(edges(&found, "b.rs"), ["a.rs", "c/deep.rs", "c/mod.rs"]);
        assert_eq!(edges(&found, "c/deep.rs"), ["a.rs", "b.rs"]);
    }

    #[test]
    fn comments_strings_visibility_and_tests_name_nothing() {
        let text = r###"
            //! [`crate::b::X`]
            /* crate::b /* nested */ crate::b::f() */
            pub(in crate::b) fn f<'a>(x: &'a str) -> char {
                let _ = (r#"crate::b::f("#, "\"crate::b::f", b"crate::b::f", '"', '\'', '\u{1}');
                'b'
            }
            #[cfg(test)]
            mod tests { use crate::b::X; fn f() { crate::b::g() } }
        "###;
        let found = of(&[("lib.rs", "mod a; mod b;"), ("a.rs", text), ("b.rs", "pub struct X;")]);
        assert!(found["a.rs"].is_empty(), "{found:?}");
    }

    #[test]
    fn modules_inside_a_file_have_parents_of_their_own() {
        let found = of(&[
            ("lib.rs", "mod a; mod b;"),
            ("a.rs", "mod inner { use super::super::b::X; use super::Y; } use super::b::Z; struct Y;"),
            ("b.rs", ""),
        ]);
        assert_eq!(edges(&found, "a.rs"), ["b.rs"]);
    }

    #[test]
    fn circles_are_found_and_trees_are_none() {
        let found = of(&[
            ("lib.rs", "mod a; mod b; mod c; mod d; use a::f; struct Root;"),
            ("a.rs", "use crate::b::f;"),
            ("b.rs", "fn g() { crate::c::f() }"),
            ("c.rs", "use super::a;"),
            ("d.rs", "use crate::a;"),
        ]);
        let found = circles(&found);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].0, ["a.rs", "b.rs", "c.rs"].map(str::to_owned).into());
        assert_eq!(found[0].1, ["a.rs", "b.rs", "c.rs", "a.rs"]);
    }
}
