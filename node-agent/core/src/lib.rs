//! The pure core of the agent: VM and lease state machines.
