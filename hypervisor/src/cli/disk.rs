//! The values of arguments that have a syntax of their own.

use std::path::PathBuf;
use std::str::FromStr;

use bellwether_types::{DiskFormat, DiskSpec};

use crate::machine::SerialOutput;

/// `path=FILE,format=raw[,readonly]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskArg(pub DiskSpec);

impl FromStr for DiskArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mut path, mut format, mut read_only) = (None, None, false);
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("path", value)) if !value.is_empty() => path = Some(absolute(value)?),
                Some(("format", "raw")) => format = Some(DiskFormat::Raw),
                Some(("format", other)) => {
                    return Err(format!("format `{other}` is not known; the only one is raw"));
                }
                None if part == "readonly" => read_only = true,
                _ => {
                    return Err(format!(
                        "`{part}` is not known; use path=FILE,format=raw[,readonly]"
                    ));
                }
            }
        }
        let path = path.ok_or("path= is missing; use path=FILE,format=raw[,readonly]")?;
        let format =
            format.ok_or("format= is missing; formats are given, never guessed: format=raw")?;
        Ok(Self(DiskSpec { path, format, read_only }))
    }
}

/// A path that does not depend on where the process is later.
pub fn absolute(text: &str) -> Result<PathBuf, String> {
    std::path::absolute(text).map_err(|error| format!("path `{text}`: {error}"))
}

/// `256M`, `4G`, or a plain number of MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryMib(pub u64);

impl FromStr for MemoryMib {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("`{text}` is not a size; use for example 256M or 4G");
        let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let number: u64 = number.parse().map_err(|_| bad())?;
        let factor = match unit.to_ascii_lowercase().as_str() {
            "" | "m" | "mib" => 1,
            "g" | "gib" => 1024,
            _ => return Err(bad()),
        };
        number.checked_mul(factor).map(Self).ok_or_else(bad)
    }
}

/// `stdio` or `file=FILE`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SerialArg(pub SerialOutput);

impl FromStr for SerialArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            None if text == "stdio" => Ok(Self(SerialOutput::Stdout)),
            Some(("file", path)) if !path.is_empty() => {
                Ok(Self(SerialOutput::File(absolute(path)?)))
            }
            _ => Err(format!("`{text}` is not known; use stdio or file=FILE")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_disks_are_parsed_and_mistakes_explained() {
        assert_eq!("1200M".parse(), Ok(MemoryMib(1200)));
        assert_eq!("4G".parse(), Ok(MemoryMib(4096)));
        assert!("4T".parse::<MemoryMib>().unwrap_err().contains("256M"));
        let disk: DiskArg = "path=/d.raw,format=raw,readonly".parse().unwrap();
        assert!(disk.0.read_only);
        assert!("path=/d.raw".parse::<DiskArg>().unwrap_err().contains("never guessed"));
        assert!("path=/d.raw,format=qcow2".parse::<DiskArg>().unwrap_err().contains("qcow2"));
        assert!("stdin".parse::<SerialArg>().is_err());
    }
}
