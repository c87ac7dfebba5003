//! Join tokens: what an administrator copies to a new host.
//!
//! ```text
//! bw1.<base64url of the body>.<checksum>
//! body:  role (1)  CA pin (32)  secret (32)  count (1)  count times: family (4 or 6) address port (2)
//! ```
//!
//! The checksum is over the text before it, so that every slip of copying is found before the
//! newcomer talks to anybody. It is no protection against forgery: the secret is.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::{SecureRandom, SystemRandom};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use crate::ca::{CaPin, parse_hex, sha256, write_hex};
use crate::identity::Role;

const PREFIX: &str = "bw1";
/// Eight base64 characters: 48 bits.
const CHECKSUM_LEN: usize = 8;
/// More than all controllers of the largest cluster.
const ENDPOINTS_MAX: usize = 32;
/// The longest token has about 900 characters.
const TEXT_LEN_MAX: usize = 4096;

/// Why a text is not a join token, or a token cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error("this is not a join token: it must begin with `bw1.` and have three parts")]
    Form,
    #[error("this join token is of version `{0}`; this program reads `bw1`")]
    Version(String),
    #[error("the join token is damaged (its checksum does not match): copy it again, whole")]
    Checksum,
    #[error("the join token's contents are malformed: {0}")]
    Body(&'static str),
    #[error("a join token needs 1 to {ENDPOINTS_MAX} addresses; it has {0}")]
    Endpoints(usize),
    #[error("the secret of a join token has 43 characters of base64url")]
    Secret,
    #[error("the hash of a secret has 64 hexadecimal digits")]
    Hash,
    #[error("the system gave no random bytes")]
    Random,
}

/// The secret part of a token. It is wiped from memory when dropped and never printed.
#[derive(Clone)]
pub struct JoinSecret(Zeroizing<[u8; 32]>);

impl JoinSecret {
    pub fn generate() -> Result<Self, TokenError> {
        let mut secret = Zeroizing::new([0; 32]);
        fill_random(secret.as_mut())?;
        Ok(Self(secret))
    }

    /// The text for the field `secret` of a join request.
    pub fn to_wire(&self) -> Zeroizing<String> {
        Zeroizing::new(URL_SAFE_NO_PAD.encode(*self.0))
    }

    /// Reads the field `secret` of a join request.
    pub fn from_wire(text: &str) -> Result<Self, TokenError> {
        let mut secret = Zeroizing::new([0; 32]);
        match URL_SAFE_NO_PAD.decode_slice(text, secret.as_mut()) {
            Ok(32) => Ok(Self(secret)),
            _ => Err(TokenError::Secret),
        }
    }

    /// What the cluster keeps. A secret of 256 random bits needs no slow hash.
    pub fn hash(&self) -> SecretHash {
        SecretHash(sha256(self.0.as_ref()))
    }
}

impl fmt::Debug for JoinSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JoinSecret(…)")
    }
}

/// The hash of a token's secret: all that replicated state holds of it. Compared in constant time.
#[derive(Clone, Copy, Debug, Eq)]
pub struct SecretHash([u8; 32]);

impl SecretHash {
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl PartialEq for SecretHash {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl fmt::Display for SecretHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

impl FromStr for SecretHash {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_hex(text).map(Self).ok_or(TokenError::Hash)
    }
}

/// A join token: what for, which CA, the secret, and where to go.
#[derive(Clone, Debug)]
pub struct JoinToken {
    pub role: Role,
    pub ca_pin: CaPin,
    pub secret: JoinSecret,
    /// Join ports of controllers, in the order in which to try them.
    pub endpoints: Vec<SocketAddr>,
}

impl JoinToken {
    /// Makes a token with a new secret.
    pub fn generate(
        role: Role,
        ca_pin: CaPin,
        endpoints: Vec<SocketAddr>,
    ) -> Result<Self, TokenError> {
        check_count(endpoints.len())?;
        Ok(Self { role, ca_pin, secret: JoinSecret::generate()?, endpoints })
    }

    /// What the cluster keeps of the secret.
    pub fn secret_hash(&self) -> SecretHash {
        self.secret.hash()
    }

    /// The text that an administrator copies. It contains the secret: show it once, log it never.
    pub fn to_text(&self) -> Result<Zeroizing<String>, TokenError> {
        let body = self.encode_body()?;
        let text =
            Zeroizing::new(format!("{PREFIX}.{}", *Zeroizing::new(URL_SAFE_NO_PAD.encode(&*body))));
        Ok(Zeroizing::new(format!("{}.{}", *text, checksum(&text))))
    }

    fn encode_body(&self) -> Result<Zeroizing<Vec<u8>>, TokenError> {
        let count = check_count(self.endpoints.len())?;
        // All the room at once, because growing would leave copies of the secret behind.
        let mut body = Zeroizing::new(Vec::with_capacity(66 + 19 * ENDPOINTS_MAX));
        body.push(role_byte(self.role));
        body.extend_from_slice(self.ca_pin.as_bytes());
        body.extend_from_slice(self.secret.0.as_ref());
        body.push(count);
        for endpoint in &self.endpoints {
            match endpoint.ip() {
                IpAddr::V4(ip) => {
                    body.push(4);
                    body.extend_from_slice(&ip.octets());
                }
                IpAddr::V6(ip) => {
                    body.push(6);
                    body.extend_from_slice(&ip.octets());
                }
            }
            body.extend_from_slice(&endpoint.port().to_be_bytes());
        }
        Ok(body)
    }

    fn decode_body(body: &[u8]) -> Result<Self, TokenError> {
        let mut rest = body;
        let [role] = take(&mut rest)?;
        let role = role_of(role)?;
        let ca_pin = CaPin::from_bytes(take(&mut rest)?);
        let secret = JoinSecret(Zeroizing::new(take(&mut rest)?));
        let [count] = take(&mut rest)?;
        check_count(usize::from(count))?;
        let endpoints = (0..count).map(|_| take_endpoint(&mut rest)).collect::<Result<_, _>>()?;
        if !rest.is_empty() {
            return Err(TokenError::Body("something follows its end"));
        }
        Ok(Self { role, ca_pin, secret, endpoints })
    }
}

impl FromStr for JoinToken {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() > TEXT_LEN_MAX {
            return Err(TokenError::Form);
        }
        // A terminal may have broken the line; white space is never part of a token.
        let mut compact = Zeroizing::new(String::with_capacity(text.len()));
        compact.extend(text.chars().filter(|c| !c.is_whitespace()));
        let (covered, sum) = compact.rsplit_once('.').ok_or(TokenError::Form)?;
        let (prefix, body) = covered.split_once('.').ok_or(TokenError::Form)?;
        if sum != checksum(covered) {
            return Err(misread(prefix));
        }
        if prefix != PREFIX {
            return Err(TokenError::Version(prefix.chars().take(8).collect()));
        }
        let body = URL_SAFE_NO_PAD.decode(body).map_err(|_| TokenError::Body("no base64url"))?;
        Self::decode_body(&Zeroizing::new(body))
    }
}

/// A text that does not even begin like a token is more likely something else than a damaged one.
fn misread(prefix: &str) -> TokenError {
    if prefix == PREFIX { TokenError::Checksum } else { TokenError::Form }
}

fn checksum(covered: &str) -> String {
    let mut text = URL_SAFE_NO_PAD.encode(sha256(covered.as_bytes()));
    text.truncate(CHECKSUM_LEN);
    text
}

fn check_count(count: usize) -> Result<u8, TokenError> {
    match u8::try_from(count) {
        Ok(small) if (1..=ENDPOINTS_MAX).contains(&count) => Ok(small),
        _ => Err(TokenError::Endpoints(count)),
    }
}

fn role_byte(role: Role) -> u8 {
    match role {
        Role::Controller => 1,
        Role::Agent => 2,
        Role::Admin => 3,
    }
}

fn role_of(byte: u8) -> Result<Role, TokenError> {
    match byte {
        1 => Ok(Role::Controller),
        2 => Ok(Role::Agent),
        3 => Ok(Role::Admin),
        _ => Err(TokenError::Body("unknown role")),
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], TokenError> {
    let (head, tail) = rest.split_first_chunk::<N>().ok_or(TokenError::Body("too short"))?;
    *rest = tail;
    Ok(*head)
}

fn take_endpoint(rest: &mut &[u8]) -> Result<SocketAddr, TokenError> {
    let [family] = take(rest)?;
    let ip: IpAddr = match family {
        4 => Ipv4Addr::from(take::<4>(rest)?).into(),
        6 => Ipv6Addr::from(take::<16>(rest)?).into(),
        _ => return Err(TokenError::Body("unknown address family")),
    };
    Ok(SocketAddr::new(ip, u16::from_be_bytes(take(rest)?)))
}

pub(crate) fn fill_random(bytes: &mut [u8]) -> Result<(), TokenError> {
    SystemRandom::new().fill(bytes).map_err(|_| TokenError::Random)
}
