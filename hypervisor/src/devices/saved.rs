//! Saved forms: each device's state as a section of the state file.

use bellwether_statefile::Section;
use serde::{Serialize, de::DeserializeOwned};

/// A device's saved form. Its kind and version never change their meaning once released.
pub trait SavedForm: Serialize + DeserializeOwned {
    const KIND: &'static str;
    const VERSION: u32;
}

/// Why a saved form cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SavedError {
    #[error("section {kind} has version {found}; this VMM knows version {known}")]
    Version { kind: String, found: u32, known: u32 },
    #[error("section {kind} cannot be decoded: {source}")]
    Decode { kind: String, source: postcard::Error },
    #[error("section {kind} cannot be encoded: {source}")]
    Encode { kind: String, source: postcard::Error },
    #[error("section {kind}: {why}")]
    Mismatch { kind: String, why: String },
}

/// The section's name: the kind, and the instance where there can be several.
pub fn section_name<T: SavedForm>(instance: Option<usize>) -> String {
    match instance {
        Some(instance) => format!("{}.{instance}", T::KIND),
        None => T::KIND.to_owned(),
    }
}

/// Encodes a saved form.
pub fn encode<T: SavedForm>(instance: Option<usize>, state: &T) -> Result<Section, SavedError> {
    let kind = section_name::<T>(instance);
    match postcard::to_stdvec(state) {
        Ok(bytes) => Ok(Section { kind, version: T::VERSION, bytes }),
        Err(source) => Err(SavedError::Encode { kind, source }),
    }
}

/// Decodes a saved form; bytes that are left over are an error.
pub fn decode<T: SavedForm>(section: &Section) -> Result<T, SavedError> {
    let kind = || section.kind.clone();
    if section.version != T::VERSION {
        return Err(SavedError::Version {
            kind: kind(),
            found: section.version,
            known: T::VERSION,
        });
    }
    let (state, rest) = postcard::take_from_bytes(&section.bytes)
        .map_err(|source| SavedError::Decode { kind: kind(), source })?;
    if !rest.is_empty() {
        let why = format!("{} bytes are left over", rest.len());
        return Err(SavedError::Mismatch { kind: kind(), why });
    }
    Ok(state)
}
