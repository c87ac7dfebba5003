//! openraft on redb: types, log store, state machine, network.
