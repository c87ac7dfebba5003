//! Conversions of rules. Names of nodes and VMs are resolved by who knows them.

use std::collections::BTreeMap;

use bellwether_types::{ClusterPatch, ClusterSettings, Failback, PreCopy, RestartLimit, Strength};

use crate::{ConvertError, v1};

impl From<ClusterSettings> for v1::ClusterSettings {
    fn from(settings: ClusterSettings) -> Self {
        let ClusterSettings {
            reserve_nodes,
            quarantine_exits,
            quarantine_window_s,
            quarantine_s,
            pre_copy_mib_s,
        } = settings;
        Self { reserve_nodes, quarantine_exits, quarantine_window_s, quarantine_s, pre_copy_mib_s }
    }
}

impl From<v1::SetClusterRequest> for ClusterPatch {
    fn from(request: v1::SetClusterRequest) -> Self {
        let v1::SetClusterRequest {
            reserve_nodes,
            quarantine_exits,
            quarantine_window_s,
            quarantine_s,
            pre_copy_mib_s,
        } = request;
        Self { reserve_nodes, quarantine_exits, quarantine_window_s, quarantine_s, pre_copy_mib_s }
    }
}

/// When a VM goes back; an empty word says nothing.
pub fn failback(word: &str) -> Result<Option<Failback>, ConvertError> {
    if word.is_empty() {
        return Ok(None);
    }
    Failback::from_word(word).map(Some).ok_or_else(|| ConvertError::Invalid {
        field: "failback",
        value: word.to_owned(),
        expected: "give never, immediately, or hours of the day in UTC like 22-6",
    })
}

/// What follows when memory changes too fast; an empty word says nothing.
pub fn pre_copy(word: &str) -> Result<Option<PreCopy>, ConvertError> {
    if word.is_empty() {
        return Ok(None);
    }
    PreCopy::from_word(word).map(Some).ok_or_else(|| ConvertError::Invalid {
        field: "pre_copy",
        value: word.to_owned(),
        expected: "give finish, give-up or never",
    })
}

pub fn groups(groups: v1::Groups) -> Result<BTreeMap<String, Strength>, ConvertError> {
    let strength = |(group, word): (String, String)| match Strength::from_word(&word) {
        Some(strength) => Ok((group, strength)),
        None => Err(ConvertError::Invalid {
            field: "anti_affinity",
            value: word,
            expected: "a group is soft or hard",
        }),
    };
    groups.groups.into_iter().map(strength).collect()
}

pub fn restart_limit(limit: v1::RestartLimit) -> Option<RestartLimit> {
    let v1::RestartLimit { times, period_s } = limit;
    (times > 0).then_some(RestartLimit { times, period_s })
}
