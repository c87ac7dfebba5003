//! Looks for a text in a stream that comes in pieces.

/// Remembers only as much of what came before as the text could begin in.
pub struct Search {
    text: Vec<u8>,
    tail: Vec<u8>,
}

impl Search {
    pub fn new(text: &[u8]) -> Self {
        Self { text: text.to_vec(), tail: Vec::new() }
    }

    /// Takes the next piece; whether the text has now appeared.
    pub fn feed(&mut self, piece: &[u8]) -> bool {
        if self.text.is_empty() {
            return true;
        }
        self.tail.extend_from_slice(piece);
        let found = self.tail.windows(self.text.len()).any(|window| window == self.text);
        let keep = self.tail.len().min(self.text.len() - 1);
        self.tail.drain(..self.tail.len() - keep);
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_found_wherever_the_pieces_break() {
        let stream = b"tick 4\nlologin: ";
        for cut in 0..=stream.len() {
            let mut search = Search::new(b"login:");
            let found = [&stream[..cut], &stream[cut..]].map(|piece| search.feed(piece));
            assert!(found.contains(&true), "{cut}");
        }
        let mut bytewise = Search::new(b"login:");
        let found = stream.iter().filter(|byte| bytewise.feed(&[**byte])).count();
        assert_eq!(found, 1, "it is found once");
        assert!(!Search::new(b"x").feed(stream));
        assert!(Search::new(b"").feed(b""));
    }
}
