//! The shared page through which a lease deadline reaches a VMM.
