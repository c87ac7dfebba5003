//! The real `bell`, run as a process: against a server over mutual TLS, at a terminal, and alone.

#![allow(clippy::unwrap_used)] // A helper that fails fails its test.

mod cluster;
mod init;
mod support;
mod terminal;
