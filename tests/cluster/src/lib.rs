//! Clusters of real processes: harness, demonstration, tests.
