//! How records look on disk and payloads on the wire.
//!
//! A *record* (one log entry, the vote, …) is `version: u8, checksum: u64 LE, postcard body`. The
//! checksum is XXH3-64 of the body, seeded with the place that the record belongs to, so that a
//! good record in the wrong place is as corrupt as a bad one. postcard alone would decode many a
//! flipped bit to another valid value; redb verifies its pages when it is opened, and not after.
//!
//! An *envelope* (one RPC payload) is `version: u8, postcard body`; TLS guards its bytes.
//!
//! A *snapshot image* is a fixed header, readable without the body, then the postcard body:
//! `magic: [u8; 8], version: u8, length: u64 LE, checksum: u128 LE (XXH3-128)`.

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;
use xxhash_rust::xxh3::{xxh3_64_with_seed, xxh3_128};

const RECORD_VERSION: u8 = 1;
const RECORD_HEADER: usize = 1 + 8;
const ENVELOPE_VERSION: u8 = 1;
const SNAPSHOT_MAGIC: [u8; 8] = *b"BWRAFTSN";
const SNAPSHOT_VERSION: u8 = 1;
const SNAPSHOT_HEADER: usize = 8 + 1 + 8 + 16;

/// Why bytes were not what they should be.
#[derive(Debug, Error)]
pub enum CodecError {
    #[error("{found} bytes are too short: the header alone has {needed}")]
    Short { found: usize, needed: usize },
    #[error("not a snapshot: it does not begin with its magic")]
    Magic,
    #[error("version {found} is not supported; this program reads version {supported}")]
    Version { found: u8, supported: u8 },
    #[error("the header says {said} bytes of body, and there are {found}")]
    Length { said: u64, found: u64 },
    #[error("the checksum does not match: the bytes are corrupt")]
    Checksum,
    #[error("the body does not decode: {0}")]
    Decode(postcard::Error),
    #[error("{0} bytes follow the body")]
    Trailing(usize),
    #[error(
        "the state has format {found}, and this program reads formats up to {supported}; start the \
         release that wrote it"
    )]
    StateFormat { found: u32, supported: u32 },
    #[error("encode: {0}")]
    Encode(postcard::Error),
}

/// Encodes a record for the place that `seed` names.
pub(crate) fn encode_record<T: Serialize>(seed: u64, value: &T) -> Result<Vec<u8>, CodecError> {
    let mut bytes = vec![0; RECORD_HEADER];
    bytes[0] = RECORD_VERSION;
    let mut bytes = postcard::to_extend(value, bytes).map_err(CodecError::Encode)?;
    let checksum = xxh3_64_with_seed(&bytes[RECORD_HEADER..], seed);
    bytes[1..RECORD_HEADER].copy_from_slice(&checksum.to_le_bytes());
    Ok(bytes)
}

/// Decodes a record from the place that `seed` names.
pub(crate) fn decode_record<T: DeserializeOwned>(seed: u64, bytes: &[u8]) -> Result<T, CodecError> {
    let (version, rest) = split_byte(bytes, RECORD_HEADER)?;
    expect_version(version, RECORD_VERSION)?;
    let Some((checksum, body)) = rest.split_first_chunk::<8>() else {
        return Err(CodecError::Short { found: bytes.len(), needed: RECORD_HEADER });
    };
    if u64::from_le_bytes(*checksum) != xxh3_64_with_seed(body, seed) {
        return Err(CodecError::Checksum);
    }
    decode_body(body)
}

/// Encodes an RPC payload.
pub(crate) fn encode_envelope<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
    postcard::to_extend(value, vec![ENVELOPE_VERSION]).map_err(CodecError::Encode)
}

/// Decodes an RPC payload.
pub(crate) fn decode_envelope<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    let (version, body) = split_byte(bytes, 1)?;
    expect_version(version, ENVELOPE_VERSION)?;
    decode_body(body)
}

/// Encodes a whole state as a snapshot image.
pub(crate) fn encode_snapshot<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
    let bytes = vec![0; SNAPSHOT_HEADER];
    let mut bytes = postcard::to_extend(value, bytes).map_err(CodecError::Encode)?;
    let (header, body) = bytes.split_at_mut(SNAPSHOT_HEADER);
    header[..8].copy_from_slice(&SNAPSHOT_MAGIC);
    header[8] = SNAPSHOT_VERSION;
    header[9..17].copy_from_slice(&(body.len() as u64).to_le_bytes());
    header[17..].copy_from_slice(&xxh3_128(body).to_le_bytes());
    Ok(bytes)
}

/// Checks a snapshot image without decoding it.
pub(crate) fn verify_snapshot(bytes: &[u8]) -> Result<&[u8], CodecError> {
    let short = || CodecError::Short { found: bytes.len(), needed: SNAPSHOT_HEADER };
    let (magic, rest) = bytes.split_first_chunk::<8>().ok_or_else(short)?;
    if *magic != SNAPSHOT_MAGIC {
        return Err(CodecError::Magic);
    }
    let (version, rest) = rest.split_first().ok_or_else(short)?;
    expect_version(*version, SNAPSHOT_VERSION)?;
    let (length, rest) = rest.split_first_chunk::<8>().ok_or_else(short)?;
    let (checksum, body) = rest.split_first_chunk::<16>().ok_or_else(short)?;
    let (said, found) = (u64::from_le_bytes(*length), body.len() as u64);
    if said != found {
        return Err(CodecError::Length { said, found });
    }
    if u128::from_le_bytes(*checksum) != xxh3_128(body) {
        return Err(CodecError::Checksum);
    }
    Ok(body)
}

/// Checks and decodes a snapshot image of a state, which begins with the version of its own
/// structure: postcard would decode another one to nonsense, or not at all, so that is looked at
/// first.
pub(crate) fn decode_state<T: DeserializeOwned>(
    bytes: &[u8],
    supported: u32,
) -> Result<T, CodecError> {
    let body = verify_snapshot(bytes)?;
    match postcard::take_from_bytes(body).map_err(CodecError::Decode)? {
        (found, _) if found > supported => Err(CodecError::StateFormat { found, supported }),
        _ => decode_body(body),
    }
}

fn split_byte(bytes: &[u8], needed: usize) -> Result<(u8, &[u8]), CodecError> {
    match bytes.split_first() {
        Some((first, rest)) => Ok((*first, rest)),
        None => Err(CodecError::Short { found: 0, needed }),
    }
}

fn expect_version(found: u8, supported: u8) -> Result<(), CodecError> {
    if found == supported { Ok(()) } else { Err(CodecError::Version { found, supported }) }
}

fn decode_body<T: DeserializeOwned>(body: &[u8]) -> Result<T, CodecError> {
    let (value, rest) = postcard::take_from_bytes(body).map_err(CodecError::Decode)?;
    if rest.is_empty() { Ok(value) } else { Err(CodecError::Trailing(rest.len())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Sample = (String, Vec<u64>, Option<u8>);

    fn sample() -> Sample {
        ("bell".into(), vec![1, 1 << 40], Some(7))
    }

    fn decode_snapshot<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
        decode_body(verify_snapshot(bytes)?)
    }

    #[test]
    fn every_flipped_bit_and_every_cut_of_a_record_is_an_error() {
        let bytes = encode_record(9, &sample()).unwrap();
        assert_eq!(decode_record::<Sample>(9, &bytes).unwrap(), sample());
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode_record::<Sample>(9, &bad).is_err(), "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(decode_record::<Sample>(9, &bytes[..length]).is_err(), "length {length}");
        }
    }

    #[test]
    fn a_record_in_the_wrong_place_is_corrupt() {
        let bytes = encode_record(9, &sample()).unwrap();
        assert!(matches!(decode_record::<Sample>(10, &bytes), Err(CodecError::Checksum)));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_of_a_snapshot_is_an_error() {
        let bytes = encode_snapshot(&sample()).unwrap();
        assert_eq!(decode_snapshot::<Sample>(&bytes).unwrap(), sample());
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode_snapshot::<Sample>(&bad).is_err(), "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(decode_snapshot::<Sample>(&bytes[..length]).is_err(), "length {length}");
        }
    }

    #[test]
    fn a_state_of_another_format_is_named_before_it_is_decoded() {
        use bellwether_core::State;
        use bellwether_core::state::STATE_FORMAT;
        let newer = STATE_FORMAT + 1;
        let mut state = State::default();
        state.format = newer;
        let image = encode_snapshot(&state).unwrap();
        let error = decode_state::<State>(&image, STATE_FORMAT).unwrap_err().to_string();
        assert!(error.starts_with(&format!("the state has format {newer}, ")), "{error}");
        // Fields that this program does not know: only the format of their structure is looked at.
        let image = encode_snapshot(&(newer, "a field that nobody here knows")).unwrap();
        let error = decode_state::<State>(&image, STATE_FORMAT).unwrap_err();
        assert!(matches!(error, CodecError::StateFormat { found, .. } if found == newer));
        let image = encode_snapshot(&State::default()).unwrap();
        assert_eq!(decode_state::<State>(&image, STATE_FORMAT).unwrap(), State::default());
    }

    #[test]
    fn a_newer_version_is_named() {
        let mut bytes = encode_envelope(&sample()).unwrap();
        assert_eq!(decode_envelope::<Sample>(&bytes).unwrap(), sample());
        bytes[0] = 2;
        let error = decode_envelope::<Sample>(&bytes).unwrap_err();
        assert_eq!(error.to_string(), "version 2 is not supported; this program reads version 1");
    }
}
