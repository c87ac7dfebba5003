//! What an agent says about itself (the action `metadata`, XML), and whether settings fit it.

use std::collections::BTreeSet;

use serde::Serialize;

use crate::parameters::Parameters;

/// The longest metadata that is read; the longest of fence-agents has 20 KiB.
const XML_MAX: usize = 1 << 20;
/// What power fencing needs.
const NEEDED: [&str; 2] = ["off", "status"];

/// An agent, as it describes itself.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Metadata {
    pub name: String,
    pub about: String,
    pub parameters: Vec<Parameter>,
    pub actions: BTreeSet<String>,
}

/// One parameter.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Parameter {
    pub name: String,
    pub about: String,
    pub required: bool,
    pub deprecated: bool,
    /// The older name that it replaces; both are understood.
    pub obsoletes: Option<String>,
    pub kind: Kind,
    pub default: Option<String>,
}

/// What values a parameter takes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    Text,
    Boolean,
    /// Also seconds.
    Number,
    OneOf(Vec<String>),
}

/// Why metadata cannot be read.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MetadataError {
    #[error("its metadata has {0} bytes, more than any agent's")]
    TooLong(usize),
    #[error("its metadata is no XML: {0}")]
    Xml(String),
    #[error("its metadata has no <{0}>: it is no fence agent")]
    Missing(&'static str),
}

/// What is wrong with the settings.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Problem {
    #[error("`{agent}` has no action `{action}`, without which a host cannot be proven off")]
    NoAction { agent: String, action: &'static str },
    #[error("`{agent}` has no parameter `{name}`{}", hint.as_ref().map(|it| format!("; do you mean `{it}`?")).unwrap_or_default())]
    Unknown { agent: String, name: String, hint: Option<String> },
    #[error("`{agent}` needs `{name}`: {about}")]
    Missing { agent: String, name: String, about: String },
    #[error("`{name}` of `{agent}` takes {expected}")]
    Value { agent: String, name: String, expected: String },
    #[error("`action` is chosen by the cluster; leave it out")]
    Action,
    #[error("`{name}` has a line break in it, or `=` in its name")]
    Broken { name: String },
}

impl Metadata {
    /// Reads what an agent printed.
    pub fn parse(xml: &str) -> Result<Self, MetadataError> {
        if xml.len() > XML_MAX {
            return Err(MetadataError::TooLong(xml.len()));
        }
        let document = roxmltree::Document::parse(xml.trim())
            .map_err(|error| MetadataError::Xml(error.to_string()))?;
        let agent = document.root_element();
        if !agent.has_tag_name("resource-agent") {
            return Err(MetadataError::Missing("resource-agent"));
        }
        let section = |name: &'static str| {
            agent
                .children()
                .find(|node| node.has_tag_name(name))
                .ok_or(MetadataError::Missing(name))
        };
        let parameters = section("parameters")?.children();
        let actions = section("actions")?.children().filter(|node| node.has_tag_name("action"));
        Ok(Self {
            name: agent.attribute("name").unwrap_or_default().to_owned(),
            about: agent.attribute("shortdesc").unwrap_or_default().to_owned(),
            parameters: parameters
                .filter(|node| node.has_tag_name("parameter"))
                .filter_map(|node| Parameter::read(&node))
                .collect(),
            actions: actions.filter_map(|node| Some(node.attribute("name")?.to_owned())).collect(),
        })
    }

    /// Whether a host can be switched off, and proven off, with these settings. Finds all problems.
    pub fn check(&self, settings: &Parameters) -> Vec<Problem> {
        let agent = || self.name.clone();
        let lacks = NEEDED.into_iter().filter(|action| !self.actions.contains(*action));
        let mut problems: Vec<Problem> =
            lacks.map(|action| Problem::NoAction { agent: agent(), action }).collect();
        problems.extend(settings.broken().map(|name| Problem::Broken { name: name.to_owned() }));
        problems.extend(settings.names().filter_map(|name| self.check_one(name, settings)));
        let missing = self.parameters.iter().filter(|parameter| {
            parameter.required && parameter.default.is_none() && !self.is_given(parameter, settings)
        });
        problems.extend(missing.map(|parameter| Problem::Missing {
            agent: agent(),
            name: parameter.name.clone(),
            about: parameter.about.clone(),
        }));
        problems
    }

    fn check_one(&self, name: &str, settings: &Parameters) -> Option<Problem> {
        let agent = self.name.clone();
        if name == "action" || name == "option" {
            return Some(Problem::Action);
        }
        let Some(parameter) = self.find(name) else {
            let hint = self.nearest(name);
            return Some(Problem::Unknown { agent, name: name.to_owned(), hint });
        };
        let value = settings.get(name).unwrap_or_default();
        let expected = parameter.kind.refuses(&value)?;
        Some(Problem::Value { agent, name: name.to_owned(), expected })
    }

    /// Agents take `-` and `_` for the same.
    fn find(&self, name: &str) -> Option<&Parameter> {
        self.parameters.iter().find(|parameter| alike(&parameter.name, name))
    }

    /// Under its own name, or the one that it obsoletes, or the one that obsoletes it.
    fn is_given(&self, parameter: &Parameter, settings: &Parameters) -> bool {
        let given = |name: &str| settings.names().any(|given| alike(given, name));
        let newer = |other: &&Parameter| other.obsoletes.as_ref() == Some(&parameter.name);
        given(&parameter.name)
            || parameter.obsoletes.as_deref().is_some_and(given)
            || self.parameters.iter().filter(newer).any(|other| given(&other.name))
    }

    /// A name that contains this one, or the other way round.
    fn nearest(&self, name: &str) -> Option<String> {
        let near = |other: &&Parameter| other.name.contains(name) || name.contains(&other.name);
        self.parameters.iter().find(near).map(|parameter| parameter.name.clone())
    }
}

fn alike(one: &str, other: &str) -> bool {
    one.replace('-', "_") == other.replace('-', "_")
}

impl Parameter {
    fn read(node: &roxmltree::Node<'_, '_>) -> Option<Self> {
        let child = |name: &str| node.children().find(|child| child.has_tag_name(name));
        let content = child("content");
        let about = child("shortdesc").and_then(|node| node.text()).unwrap_or_default();
        let is = |name: &str| node.attribute(name).is_some_and(|value| value == "1");
        Some(Self {
            name: node.attribute("name")?.to_owned(),
            about: about.trim().to_owned(),
            required: is("required"),
            deprecated: is("deprecated"),
            obsoletes: node.attribute("obsoletes").map(str::to_owned),
            kind: content.map_or(Kind::Text, |content| Kind::read(&content)),
            default: content.and_then(|it| it.attribute("default")).map(str::to_owned),
        })
    }
}

impl Kind {
    fn read(content: &roxmltree::Node<'_, '_>) -> Self {
        match content.attribute("type") {
            Some("boolean") => Self::Boolean,
            Some("integer" | "second") => Self::Number,
            Some("select") => {
                let options = content.children().filter(|child| child.has_tag_name("option"));
                Self::OneOf(
                    options.filter_map(|it| Some(it.attribute("value")?.to_owned())).collect(),
                )
            }
            _ => Self::Text,
        }
    }

    /// What would be taken, if this is not.
    fn refuses(&self, value: &str) -> Option<String> {
        const BOOLEANS: [&str; 8] = ["1", "0", "true", "false", "yes", "no", "on", "off"];
        match self {
            Self::Text => None,
            Self::Boolean if BOOLEANS.contains(&value.to_ascii_lowercase().as_str()) => None,
            Self::Boolean => Some("true or false".to_owned()),
            Self::Number if value.parse::<i64>().is_ok() => None,
            Self::Number => Some("a whole number".to_owned()),
            Self::OneOf(options) if options.iter().any(|option| option == value) => None,
            Self::OneOf(options) => Some(format!("one of {}", options.join(", "))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const XML: &str = r#"<?xml version="1.0" ?>
        <resource-agent name="fence_it" shortdesc="Fences it">
        <longdesc>Long &amp; winding</longdesc>
        <parameters>
          <parameter name="action" unique="0" required="1"><content type="string" default="reboot"/></parameter>
          <parameter name="ip" required="1" obsoletes="ipaddr"><content type="string"/>
            <shortdesc lang="en">Address of the device</shortdesc></parameter>
          <parameter name="ipaddr" required="0" deprecated="1"><content type="string"/></parameter>
          <parameter name="lanplus" required="0"><content type="boolean"/></parameter>
          <parameter name="power_wait" required="0"><content type="second" default="0"/></parameter>
          <parameter name="method"><content type="select" default="onoff">
            <option value="onoff"/><option value="cycle"/></content></parameter>
        </parameters>
        <actions><action name="on" automatic="0"/><action name="off"/><action name="status"/></actions>
        </resource-agent>"#;

    fn problems(pairs: &[(&str, &str)]) -> Vec<String> {
        let settings = Parameters::new(pairs.iter().copied());
        Metadata::parse(XML).unwrap().check(&settings).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn settings_that_fit_have_no_problem() {
        let none: Vec<String> = Vec::new();
        assert_eq!(problems(&[("ip", "10.0.0.9"), ("lanplus", "1"), ("power-wait", "4")]), none);
        assert_eq!(problems(&[("ipaddr", "10.0.0.9"), ("method", "cycle")]), none, "the old name");
    }

    #[test]
    fn each_problem_is_named() {
        assert_eq!(problems(&[]), ["`fence_it` needs `ip`: Address of the device"]);
        for (name, value, expected) in [
            ("lan", "1", "`fence_it` has no parameter `lan`; do you mean `lanplus`?"),
            ("lanplus", "maybe", "`lanplus` of `fence_it` takes true or false"),
            ("power_wait", "long", "`power_wait` of `fence_it` takes a whole number"),
            ("method", "axe", "`method` of `fence_it` takes one of onoff, cycle"),
            ("action", "on", "`action` is chosen by the cluster; leave it out"),
        ] {
            assert_eq!(problems(&[("ip", "10.0.0.9"), (name, value)]), [expected]);
        }
    }

    #[test]
    fn an_agent_that_cannot_say_whether_a_host_is_off_proves_nothing() {
        let mut metadata = Metadata::parse(XML).unwrap();
        metadata.actions.remove("status");
        let problems = metadata.check(&Parameters::new([("ip", "10.0.0.9")]));
        assert!(
            matches!(&problems[..], [Problem::NoAction { action: "status", .. }]),
            "{problems:?}"
        );
    }

    #[test]
    fn what_is_no_metadata_is_refused() {
        assert!(matches!(Metadata::parse("usage: it"), Err(MetadataError::Xml(_))));
        assert_eq!(Metadata::parse("<html/>"), Err(MetadataError::Missing("resource-agent")));
        let cut = Metadata::parse("<resource-agent name='x'><parameters/></resource-agent>");
        assert_eq!(cut, Err(MetadataError::Missing("actions")));
        assert!(matches!(
            Metadata::parse(&"x".repeat(XML_MAX + 1)),
            Err(MetadataError::TooLong(_))
        ));
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".{0,200}", at in 0usize..1000) {
            let _ = Metadata::parse(&text);
            let cut: String = XML.chars().take(at).collect();
            let _ = Metadata::parse(&cut);
        }
    }
}
