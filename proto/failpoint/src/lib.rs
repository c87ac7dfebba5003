//! Named points at which a test can hold or kill a process.
