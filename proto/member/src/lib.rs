//! Becoming a member of a cluster.
