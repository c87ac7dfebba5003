//! Virtual network cards.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::ids::VmId;

/// The longest name of a network interface (`IFNAMSIZ` of Linux, less its NUL).
pub const INTERFACE_LEN_MAX: usize = 15;

/// The address of a network card.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The address of the card with this index, for a card that is given none: the same on every
    /// node, locally administered, and distinct as far as the identities of VMs are.
    pub fn of(vm: VmId, index: u8) -> Self {
        let [.., a, b, c, d] = *vm.uuid().as_bytes();
        Self([0x02, a, b, c, d, index])
    }

    /// Addresses of a group are nobody's own.
    pub fn is_unicast(&self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// The text is no address.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("`{0}` is not the address of a network card; give one like 02:00:5e:10:00:01")]
pub struct MacError(String);

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let error = || MacError(text.to_owned());
        let byte = |part: &str| {
            // The standard library would take a sign, too.
            let is_hex = part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
            match u8::from_str_radix(part, 16) {
                Ok(byte) if is_hex => Ok(byte),
                _ => Err(error()),
            }
        };
        let bytes = text.split(':').map(byte).collect::<Result<Vec<_>, _>>()?;
        let mac = Self(bytes.try_into().map_err(|_| error())?);
        if mac.is_unicast() { Ok(mac) } else { Err(error()) }
    }
}

/// One network card of a VM.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NicSpec {
    /// The Linux bridge that it is plugged into, by the same name on every possible owner.
    pub bridge: String,
    /// Its address; without one it is made from the VM's identity.
    pub mac: Option<Mac>,
}

const FORM: &str = "write bridge=br0[,mac=02:00:5e:10:00:01]";

impl FromStr for NicSpec {
    type Err = String;

    /// `bridge=NAME[,mac=ADDRESS]`
    fn from_str(text: &str) -> Result<Self, String> {
        let (mut bridge, mut mac) = (None, None);
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("bridge", name)) if bridge.is_none() => bridge = Some(name.to_owned()),
                Some(("mac", address)) if mac.is_none() => {
                    mac = Some(address.parse().map_err(|error: MacError| error.to_string())?);
                }
                _ => return Err(format!("`{part}` is not known, or given twice; {FORM}")),
            }
        }
        let bridge = bridge.ok_or_else(|| format!("the bridge is missing; {FORM}"))?;
        match is_interface_name(&bridge) {
            true => Ok(Self { bridge, mac }),
            false => Err(format!("no bridge has the name `{bridge}`; {FORM}")),
        }
    }
}

/// Whether a network interface can have this name.
pub(crate) fn is_interface_name(name: &str) -> bool {
    let fits = (1..=INTERFACE_LEN_MAX).contains(&name.len()) && name != "." && name != "..";
    fits && name.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':' | b'%'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_as_it_is_printed() {
        let mac: Mac = "02:00:5e:10:00:fF".parse().unwrap();
        assert_eq!(mac.to_string(), "02:00:5e:10:00:ff");
        for bad in [
            "",
            "02:00:5e:10:00",
            "02:00:5e:10:00:01:02",
            "2:0:5e:10:0:1",
            "01:00:5e:00:00:01",
            "00:00:00:00:00:00",
            "02-00-5e-10-00-01",
            "02:00:5e:10:00:+1",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }

    #[test]
    fn cards_without_an_address_get_distinct_ones_of_their_own() {
        let vm: VmId = "018f0000-0000-7000-8000-0000deadbeef".parse().unwrap();
        assert_eq!(Mac::of(vm, 1).to_string(), "02:de:ad:be:ef:01");
        assert!(Mac::of(vm, 0).is_unicast());
    }

    #[test]
    fn a_card_is_read_from_its_words() {
        let nic: NicSpec = "bridge=br0,mac=02:00:5e:10:00:01".parse().unwrap();
        assert_eq!((nic.bridge.as_str(), nic.mac.map(|mac| mac.0[5])), ("br0", Some(1)));
        assert_eq!("bridge=br0".parse::<NicSpec>().unwrap().mac, None);
        for bad in [
            "",
            "mac=02:00:5e:10:00:01",
            "bridge=",
            "bridge=a,bridge=b",
            "bridge=a,mac=1",
            "bridge=a,x=1",
        ] {
            assert!(bad.parse::<NicSpec>().is_err(), "{bad}");
        }
    }

    #[test]
    fn names_that_no_interface_has_are_seen() {
        assert!(is_interface_name("br-lan.100"));
        for bad in ["", "a/b", "br 0", "sixteen-letters-", "..", "a:b", "br%d"] {
            assert!(!is_interface_name(bad), "{bad}");
        }
    }
}
