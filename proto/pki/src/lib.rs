//! Certificates, roles and TLS configuration of a cluster.
