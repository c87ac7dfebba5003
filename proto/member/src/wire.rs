//! Members on the wire and members in files.

use bellwether_proto::{ConvertError, v1};
use bellwether_types::NodeId;

use crate::KnownController;

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
    use crate::Ports;

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
