//! Text in a fixed place: paths and messages without allocating.

use std::ffi::CStr;
use std::fmt;

/// At most `N - 1` bytes, always followed by a NUL.
#[derive(Debug)]
pub struct Text<const N: usize> {
    bytes: [u8; N],
    len: usize,
}

impl<const N: usize> Text<N> {
    /// Formats; what does not fit is left out, and [`Self::is_whole`] says so.
    pub fn new(arguments: fmt::Arguments<'_>) -> Self {
        let mut text = Self { bytes: [0; N], len: 0 };
        if fmt::write(&mut text, arguments).is_err() {
            text.len = N;
        }
        text
    }

    pub fn is_whole(&self) -> bool {
        self.len < N
    }

    /// What fits.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len.min(N.saturating_sub(1))]
    }

    /// The whole text as a path; `None` if it did not fit.
    pub fn as_c_str(&self) -> Option<&CStr> {
        self.is_whole().then(|| CStr::from_bytes_until_nul(&self.bytes).ok()).flatten()
    }
}

impl<const N: usize> fmt::Write for Text<N> {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        let room = N.saturating_sub(1).saturating_sub(self.len);
        let fits = part.len().min(room);
        self.bytes[self.len..self.len + fits].copy_from_slice(&part.as_bytes()[..fits]);
        self.len += fits;
        if fits == part.len() { Ok(()) } else { Err(fmt::Error) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_not_a_path() {
        let text = Text::<8>::new(format_args!("{}-{}", 123, 456));
        assert_eq!(text.as_c_str(), Some(c"123-456"));
        let text = Text::<8>::new(format_args!("{}-{}", 123, 4567));
        assert_eq!((text.as_c_str(), text.as_bytes()), (None, &b"123-456"[..]));
        assert!(!text.is_whole());
    }
}
