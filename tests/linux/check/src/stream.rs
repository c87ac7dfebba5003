//! One connection that never ends and whose every byte is known.

use std::io::{self, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use crate::memory::mix;

const PORT: u16 = 9000;
const WORDS: usize = 8192;
/// The reader says how far it is each time that it has got so much.
const TICK_BYTES: u64 = 256 << 10;
/// Waiting for a server that boots.
const RETRY: Duration = Duration::from_millis(200);

/// Sends words to whoever connects, for ever.
pub fn serve() -> Result<(), String> {
    let listener = TcpListener::bind(("0.0.0.0", PORT)).map_err(|error| error.to_string())?;
    println!("serving on port {PORT}");
    for connection in listener.incoming() {
        match connection {
            Ok(connection) => drop(thread::spawn(move || send(connection))),
            Err(error) => println!("a connection failed: {error}"),
        }
    }
    Ok(())
}

/// Ends when the reader is gone.
fn send(mut connection: TcpStream) -> io::Result<()> {
    for block in 0_u64.. {
        connection.write_all(&bytes_of(block))?;
    }
    Ok(())
}

fn bytes_of(block: u64) -> Vec<u8> {
    let first = block * WORDS as u64;
    (first..first + WORDS as u64).flat_map(|word| mix(word).to_le_bytes()).collect()
}

/// Reads one connection and checks every byte, for ever.
pub fn fetch(host: &str) -> Result<(), String> {
    let connection = loop {
        match TcpStream::connect((host, PORT)) {
            Ok(connection) => break connection,
            Err(_) => thread::sleep(RETRY),
        }
    };
    println!("connected to {host}");
    check(connection, |tick, bytes| println!("tick {tick} bytes={bytes}"))
}

fn check(source: impl Read, told: impl Fn(u64, u64)) -> Result<(), String> {
    let mut source = BufReader::new(source);
    let mut block = vec![0; WORDS * 8];
    for number in 0_u64.. {
        let at = number * block.len() as u64;
        source
            .read_exact(&mut block)
            .map_err(|error| format!("the stream ends at {at}: {error}"))?;
        if block != bytes_of(number) {
            return Err(format!("the stream is wrong behind byte {at}"));
        }
        let bytes = at + block.len() as u64;
        if bytes.is_multiple_of(TICK_BYTES) {
            told(bytes / TICK_BYTES, bytes);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_checked_to_its_last_byte() {
        let mut stream = [bytes_of(0), bytes_of(1)].concat();
        assert!(check(&stream[..], |_, _| {}).unwrap_err().contains("ends at 131072"));
        stream[70_000] ^= 1;
        assert!(check(&stream[..], |_, _| {}).unwrap_err().contains("wrong behind byte 65536"));
    }
}
