//! The identities of the model, printed as in its traces: node `n1`, epoch `e2`, boot `b0`.

use std::fmt;

macro_rules! word {
    ($(#[$doc:meta])* $name:ident, $letter:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u8);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}{}", $letter, self.0)
            }
        }
    };
}

word!(
    /// A node, counted from 1.
    NodeId,
    "n"
);
word!(
    /// The epoch of a VM. 0 stands for none.
    Epoch,
    "e"
);
word!(
    /// A boot of a node, counted from 0.
    Boot,
    "b"
);
word!(
    /// A VM, counted from 0.
    VmId,
    "vm"
);

impl NodeId {
    /// Where this node stands in an array of nodes.
    pub fn index(self) -> usize {
        usize::from(self.0) - 1
    }
}

impl Epoch {
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}
