//! The storage arbiter: claims and disk locks.
