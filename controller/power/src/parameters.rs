//! The parameters of an agent. Their values may be secrets, so they show nowhere: not in `Debug`, not
//! in arguments or environment, and not in what an agent printed.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;

/// A value that is shorter is not looked for in an agent's output: it would be everywhere.
const SECRET_MIN: usize = 4;

/// Names and values, as the agent's metadata names them.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Parameters(BTreeMap<String, Value>);

/// A settings file may have numbers and booleans where the agent has text.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
enum Value {
    Boolean(bool),
    Number(i64),
    Text(String),
}

impl Value {
    fn text(&self) -> String {
        match self {
            Self::Boolean(value) => u8::from(*value).to_string(),
            Self::Number(value) => value.to_string(),
            Self::Text(value) => value.clone(),
        }
    }
}

impl Parameters {
    /// From names and values.
    pub fn new<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let own = |(name, value): (&str, &str)| (name.to_owned(), Value::Text(value.to_owned()));
        Self(pairs.into_iter().map(own).collect())
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    pub(crate) fn get(&self, name: &str) -> Option<String> {
        self.0.get(name).map(Value::text)
    }

    /// What an agent reads: the action first, so that no parameter can be taken for it.
    pub(crate) fn input(&self, action: &str) -> String {
        let lines = self.0.iter().filter(|(name, _)| *name != "action");
        let lines = lines.map(|(name, value)| format!("{name}={}\n", value.text()));
        std::iter::once(format!("action={action}\n")).chain(lines).collect()
    }

    /// A name or a value that would be two lines, and so another parameter.
    pub(crate) fn broken(&self) -> Option<&str> {
        let has_break = |text: &str| text.contains(['\n', '\r', '\0']);
        let broken = |(name, value): &(&String, &Value)| {
            has_break(name) || name.contains('=') || has_break(&value.text())
        };
        self.0.iter().find(broken).map(|(name, _)| name.as_str())
    }

    /// The text with all values of secret parameters taken out.
    pub(crate) fn redact(&self, text: &str) -> String {
        let secrets =
            self.0.iter().filter(|(name, _)| is_secret(name)).map(|(_, value)| value.text());
        secrets
            .filter(|secret| secret.len() >= SECRET_MIN)
            .fold(text.to_owned(), |text, secret| text.replace(&secret, "[secret]"))
    }
}

/// Whether a parameter is one that nobody may see. The names are those of the agents of fence-agents.
pub fn is_secret(name: &str) -> bool {
    const PARTS: [&str; 7] =
        ["passw", "passphrase", "secret", "token", "apikey", "api_key", "community"];
    let name = name.to_ascii_lowercase().replace('-', "_");
    PARTS.iter().any(|part| name.contains(part)) && !name.ends_with("_script")
}

impl fmt::Debug for Parameters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_not_shown() {
        let parameters =
            Parameters::new([("ip", "10.0.0.9"), ("password", "hunter22"), ("login", "adm")]);
        assert!(!format!("{parameters:?}").contains("hunter22"));
        assert_eq!(
            parameters.redact("login adm hunter22 at 10.0.0.9"),
            "login adm [secret] at 10.0.0.9"
        );
        assert!(is_secret("snmp_priv_passwd") && is_secret("secret-key") && is_secret("PASSWORD"));
        assert!(!is_secret("password_script") && !is_secret("plug"));
    }

    #[test]
    fn a_value_cannot_become_another_parameter() {
        let parameters = Parameters::new([("plug", "1\naction=on")]);
        assert_eq!(parameters.broken(), Some("plug"));
        let parameters = Parameters::new([("action", "on"), ("plug", "1")]);
        assert_eq!(
            (parameters.broken(), parameters.input("off")),
            (None, "action=off\nplug=1\n".into())
        );
    }

    #[test]
    fn numbers_and_booleans_of_a_settings_file_become_text() {
        let parameters: Parameters =
            toml::from_str("lanplus = true\nipport = 623\nplug = \"1\"").unwrap();
        assert_eq!(parameters.input("status"), "action=status\nipport=623\nlanplus=1\nplug=1\n");
    }
}
