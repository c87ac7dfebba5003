//! A small reader of Rust source: which paths does it name?
//!
//! It knows comments, strings, and `use` trees with braces; that is enough to find
//! `use std::{collections::BTreeMap, time::{Duration, Instant}}`.

/// All paths that begin with `first`, with braces multiplied out: `std::time::Instant`.
pub fn paths(source: &str, first: &str) -> Vec<String> {
    let code = without_comments_and_strings(source);
    let start = format!("{first}::");
    let mut found = Vec::new();
    for (at, _) in code.match_indices(&start) {
        // `mystd::` is another name, and `my::std::` begins elsewhere; `::std::` is the same path.
        let before = code[..at].strip_suffix("::").unwrap_or(&code[..at]);
        if !before.ends_with(is_name) {
            expand(&code[at + start.len()..], first, &mut found);
        }
    }
    found
}

fn is_name(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Reads a path's rest, or a tree in braces, and adds each whole path. Returns what follows.
fn expand<'a>(rest: &'a str, prefix: &str, found: &mut Vec<String>) -> &'a str {
    let rest = rest.trim_start();
    if let Some(inside) = rest.strip_prefix('{') {
        return expand_tree(inside, prefix, found);
    }
    let end = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
    let (name, after) = rest.split_at(end);
    let path = format!("{prefix}::{name}");
    match after.trim_start().strip_prefix("::") {
        Some(deeper) if !name.is_empty() => expand(deeper, &path, found),
        _ => {
            found.push(path);
            after
        }
    }
}

fn expand_tree<'a>(mut rest: &'a str, prefix: &str, found: &mut Vec<String>) -> &'a str {
    loop {
        rest = rest.trim_start();
        if let Some(after) = rest.strip_prefix('}') {
            return after;
        }
        rest = expand(rest, prefix, found);
        // What is between a name and the next comma is `as other` or nothing.
        let Some(end) = rest.find([',', '}']) else { return "" };
        rest = rest[end..].strip_prefix(',').unwrap_or(&rest[end..]);
    }
}

/// The same text with blanks for everything that is not code.
pub fn without_comments_and_strings(source: &str) -> String {
    let mut code = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(c) = rest.chars().next() {
        let skip = skipped(rest);
        match skip {
            0 => {
                code.push(c);
                rest = &rest[c.len_utf8()..];
            }
            length => {
                code.push(' ');
                rest = &rest[length.min(rest.len())..];
            }
        }
    }
    code
}

/// How many bytes at the beginning are a comment or a string.
fn skipped(rest: &str) -> usize {
    if rest.starts_with("//") {
        return rest.find('\n').unwrap_or(rest.len());
    }
    if rest.starts_with("/*") {
        return rest.find("*/").map_or(rest.len(), |end| end + 2);
    }
    if let Some(raw) = rest.strip_prefix("r#\"") {
        return raw.find("\"#").map_or(rest.len(), |end| end + 5);
    }
    // A character literal could be a quote.
    if rest.starts_with("'\"'") {
        return 3;
    }
    if rest.starts_with("'\\\"'") {
        return 4;
    }
    let Some(text) = rest.strip_prefix('"') else { return 0 };
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        match c {
            '"' if !escaped => return at + 2,
            '\\' => escaped = !escaped,
            _ => escaped = false,
        }
    }
    rest.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn braces_are_multiplied_out() {
        let source = "use std::{fs, io::{self, Read as R}, time::{Duration, Instant}};\nlet x = std::net::TcpStream::connect();";
        let expected = [
            "std::fs",
            "std::io::self",
            "std::io::Read",
            "std::time::Duration",
            "std::time::Instant",
            "std::net::TcpStream::connect",
        ];
        assert_eq!(paths(source, "std"), expected);
    }

    #[test]
    fn only_code_counts() {
        let source = "// std::fs\n/* std::net */ let s = \"std::fs \\\" std::net\"; let c = '\"'; mystd::fs; my::std::fs; r#\"std::fs\"#";
        assert_eq!(paths(source, "std"), Vec::<String>::new());
        assert_eq!(paths("::std::fs::read()", "std"), ["std::fs::read"]);
    }

    #[test]
    fn unfinished_source_is_no_trouble() {
        for source in ["use std::{", "use std::", "std::{fs, {net", "\"", "/*"] {
            paths(source, "std");
        }
    }
}
