//! The pure files of the guest, compiled for the host as they are. The tests are in `tests/`.

#[path = "../../src/budget.rs"]
pub mod budget;
#[path = "../../src/cmdline.rs"]
pub mod cmdline;
#[path = "../../src/command.rs"]
pub mod command;
#[path = "../../src/journal.rs"]
pub mod journal;
#[path = "../../src/journal_format.rs"]
pub mod journal_format;
#[path = "../../src/page_stream.rs"]
pub mod page_stream;
#[path = "../../src/pages.rs"]
pub mod pages;
#[path = "../../src/pattern.rs"]
pub mod pattern;
#[path = "../../src/pvclock.rs"]
pub mod pvclock;
