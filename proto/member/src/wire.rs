//! Members on the wire and members in files.

use bellwether_proto::{ConvertError, v1};
use bellwether_types::NodeId;

use crate::{KnownController, Ports};

impl From<Ports> for v1::Ports {
    fn from(ports: Ports) -> Self {
        Self {
            api: ports.api.into(),
            raft: ports.raft.into(),
            join: ports.join.into(),
            agent: ports.agent.into(),
        }
    }
}

impl TryFrom<v1::Ports> for Ports {
    type Error = ConvertError;

    fn try_from(ports: v1::Ports) -> Result<Self, ConvertError> {
        Ok(Self {
            api: port("ports.api", ports.api)?,
            raft: port("ports.raft", ports.raft)?,
            join: port("ports.join", ports.join)?,
            agent: port("ports.agent", ports.agent)?,
        })
    }
}

fn port(field: &'static str, value: u32) -> Result<u16, ConvertError> {
    match u16::try_from(value) {
        Ok(0) | Err(_) => Err(ConvertError::Invalid {
            field,
            value: value.to_string(),
            expected: "a port is a number from 1 to 65535",
        }),
        Ok(port) => Ok(port),
    }
}

impl From<&KnownController> for v1::Member {
    fn from(controller: &KnownController) -> Self {
        Self {
            id: controller.id.0,
            name: controller.name.clone(),
            address: controller.address.to_string(),
            ports: Some(controller.ports.into()),
        }
    }
}

impl TryFrom<v1::Member> for KnownController {
    type Error = ConvertError;

    fn try_from(member: v1::Member) -> Result<Self, ConvertError> {
        let address = member.address.parse().map_err(|_| ConvertError::Invalid {
            field: "member.address",
            value: member.address.clone(),
            expected: "give an IP address without a port",
        })?;
        Ok(Self {
            id: NodeId(member.id),
            name: member.name,
            address,
            ports: member.ports.ok_or(ConvertError::Missing("member.ports"))?.try_into()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_survives_the_wire_and_a_bad_one_does_not_pass() {
        let controller = KnownController {
            id: NodeId(3),
            name: "gamma".into(),
            address: "::1".parse().unwrap(),
            ports: Ports::default(),
        };
        let wire = v1::Member::from(&controller);
        assert_eq!(KnownController::try_from(wire.clone()).unwrap(), controller);
        let named = v1::Member { address: "gamma.example".into(), ..wire.clone() };
        assert!(KnownController::try_from(named).is_err());
        let far = v1::Ports { raft: 70_000, ..wire.ports.unwrap() };
        assert!(Ports::try_from(far).is_err());
    }
}
