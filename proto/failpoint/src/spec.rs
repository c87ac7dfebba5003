//! The syntax of the environment variable.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

/// What happens at a point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Kill,
    Hold(PathBuf),
    Error(String),
}

/// One entry of the variable, with the count of its hits.
#[derive(Debug)]
pub(crate) struct Point {
    pub(crate) name: String,
    action: Action,
    only: Option<u64>,
    hits: AtomicU64,
}

impl Point {
    /// Counts one hit, and gives the action if it is due.
    pub(crate) fn fire(&self) -> Option<&Action> {
        let hit = self.hits.fetch_add(1, Ordering::Relaxed) + 1;
        self.only.is_none_or(|only| only == hit).then_some(&self.action)
    }
}

/// What the variable says.
#[derive(Debug)]
pub(crate) enum Spec {
    /// These points, as they were at the start of the process.
    Listed(Vec<Point>),
    /// All points, as the files of this directory say at each pass.
    Directory(PathBuf),
}

/// Reads the whole variable.
pub(crate) fn parse(text: &str) -> Result<Spec, String> {
    match text.strip_prefix("dir:") {
        Some(dir) if dir.starts_with('/') => Ok(Spec::Directory(dir.into())),
        Some(dir) => Err(format!("`dir:{dir}`: give an absolute directory")),
        None => parse_list(text).map(Spec::Listed),
    }
}

/// Empty entries are allowed, so that entries may be put together.
fn parse_list(text: &str) -> Result<Vec<Point>, String> {
    text.split(';').map(str::trim).filter(|entry| !entry.is_empty()).map(parse_point).collect()
}

fn parse_point(entry: &str) -> Result<Point, String> {
    let (name, rest) =
        entry.split_once('=').ok_or_else(|| format!("`{entry}` is not `name=action`"))?;
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.starts_with('.') || !name.chars().all(fits) {
        return Err(format!("`{name}` is not a name of letters, digits, `.`, `_` and `-`"));
    }
    let (action, only) = parse_count(rest)?;
    let action = parse_action(action)?;
    Ok(Point { name: name.to_owned(), action, only, hits: AtomicU64::new(0) })
}

/// Only digits after the last `@` are a count: a text or a path may hold an `@`.
fn parse_count(text: &str) -> Result<(&str, Option<u64>), String> {
    let Some((action, count)) = text.rsplit_once('@') else {
        return Ok((text, None));
    };
    if count.is_empty() || !count.bytes().all(|b| b.is_ascii_digit()) {
        return Ok((text, None));
    }
    match count.parse() {
        Ok(count) if count > 0 => Ok((action, Some(count))),
        _ => Err(format!("`@{count}`: the first hit is @1")),
    }
}

fn parse_action(text: &str) -> Result<Action, String> {
    match text.split_once(':') {
        None if text == "kill" => Ok(Action::Kill),
        Some(("hold", dir)) if dir.starts_with('/') => Ok(Action::Hold(dir.into())),
        Some(("hold", dir)) => Err(format!("`hold:{dir}`: give an absolute directory")),
        Some(("error", text)) if !text.is_empty() => Ok(Action::Error(text.to_owned())),
        _ => Err(format!("`{text}` is not kill, hold:DIR or error:TEXT")),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn every_action_is_read() {
        let points = parse_list("a=kill; b.c-d_e=hold:/x@y ;f=error:no space@2;").unwrap();
        let read: Vec<_> = points.iter().map(|p| (p.name.as_str(), &p.action, p.only)).collect();
        let expected = [
            ("a", &Action::Kill, None),
            ("b.c-d_e", &Action::Hold("/x@y".into()), None),
            ("f", &Action::Error("no space".into()), Some(2)),
        ];
        assert_eq!(read, expected);
    }

    #[test]
    fn a_directory_stands_for_all_points() {
        assert!(matches!(parse("dir:/x").unwrap(), Spec::Directory(dir) if dir == Path::new("/x")));
        assert!(matches!(parse("a=kill").unwrap(), Spec::Listed(points) if points.len() == 1));
    }

    #[test]
    fn a_count_fires_once() {
        let points = parse_list("a=kill@2").unwrap();
        let fired: Vec<bool> = (0..4).map(|_| points[0].fire().is_some()).collect();
        assert_eq!(fired, [false, true, false, false]);
    }

    #[test]
    fn mistakes_are_named() {
        for (text, part) in [
            ("a", "name=action"),
            ("=kill", "is not a name"),
            ("../a=kill", "is not a name"),
            ("a=kil", "is not kill"),
            ("a=kill@0", "the first hit"),
            ("a=hold:here", "absolute"),
            ("dir:here", "absolute"),
            ("a=error:", "is not kill"),
            ("a=kill@99999999999999999999", "the first hit"),
        ] {
            let refused = parse(text).unwrap_err();
            assert!(refused.contains(part), "{text}: {refused}");
        }
    }
}
