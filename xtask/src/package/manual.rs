//! Manual pages from `--help`, so that there is one text and it cannot be out of date.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::command::output;

/// What a page is about.
pub struct Page<'a> {
    pub program: &'a Path,
    pub name: &'a str,
    pub section: u8,
    pub about: &'a str,
    pub version: &'a str,
    /// As `2026-11-22`.
    pub date: &'a str,
}

/// The page of a program and all its subcommands.
pub fn page(page: &Page<'_>) -> Result<String> {
    let Page { name, section, about, version, date, .. } = page;
    let title = name.to_uppercase();
    let mut text = format!(
        ".TH {title} {section} {date} \"Bellwether {version}\" \"Bellwether\"\n\
         .SH NAME\n{} \\- {}\n",
        escape(name),
        escape(about)
    );
    describe(page, &[], &mut text)?;
    text.push_str(".SH SEE ALSO\n/usr/share/doc/bellwether\\-*/install.md\n");
    Ok(text)
}

/// The help of one command, then those of the commands below it.
fn describe(page: &Page<'_>, words: &[&str], text: &mut String) -> Result<()> {
    let help = output(Command::new(page.program).args(words).arg("--help").env("COLUMNS", "78"))?;
    let heading = match words {
        [] => "DESCRIPTION".to_owned(),
        _ => format!("{} {}", page.name, words.join(" ")),
    };
    text.push_str(&format!(".SH {}\n.nf\n", quoted(&heading)));
    for line in help.lines() {
        text.push_str(&escape(line));
        text.push('\n');
    }
    text.push_str(".fi\n");
    for subcommand in subcommands(&help) {
        describe(page, &[words, &[subcommand]].concat(), text)?;
    }
    Ok(())
}

/// The names below `Commands:`, but for clap's own `help`.
fn subcommands(help: &str) -> impl Iterator<Item = &str> {
    let lines = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let lines = lines.take_while(|line| line.is_empty() || line.starts_with("  "));
    let names = lines.filter_map(|line| {
        let rest = line.strip_prefix("  ").filter(|rest| !rest.starts_with(' '))?;
        rest.split_whitespace().next()
    });
    names.filter(|name| *name != "help")
}

/// Text that roff prints as it is.
fn escape(line: &str) -> String {
    let line = line.replace('\\', "\\e").replace('-', "\\-");
    match line.starts_with(['.', '\'']) {
        true => format!("\\&{line}"),
        false => line,
    }
}

fn quoted(heading: &str) -> String {
    format!("\"{}\"", escape(heading))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HELP: &str = "About it.\n\nUsage: it <COMMAND>\n\nCommands:\n  run   Run it\n          \
                        more about run\n  join  Join\n  help  Print this\n\nOptions:\n  -h, --help\n";

    #[test]
    fn commands_are_found_and_options_are_not() {
        assert_eq!(subcommands(HELP).collect::<Vec<_>>(), ["run", "join"]);
        assert_eq!(subcommands("Usage: it\n\nOptions:\n  -h\n").count(), 0);
    }

    #[test]
    fn no_line_is_taken_for_a_request() {
        assert_eq!(escape(".toml \\ -x"), "\\&.toml \\e \\-x");
        assert_eq!(escape("'quoted"), "\\&'quoted");
    }
}
