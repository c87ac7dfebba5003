//! virtio 1.x over PCI, as far as a disk needs it (the OASIS specification, version 1.2, 4.1 and 5.2).

pub mod blk;
mod msix;
mod queue;
mod transport;
