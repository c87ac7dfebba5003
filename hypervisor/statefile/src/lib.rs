//! The state file of a VM.
