//! The saved form of the serial port. The console's ring stays with the VMM that filled it.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};
use vm_superio::serial::SerialState;

use crate::devices::saved::{SavedError, SavedForm};

/// The registers in the order of the chip's addresses, and the input.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialV1 {
    pub divisor_low: u8,
    pub divisor_high: u8,
    pub interrupt_enable: u8,
    pub interrupt_identification: u8,
    pub line_control: u8,
    pub modem_control: u8,
    pub line_status: u8,
    pub modem_status: u8,
    pub scratch: u8,
    /// In the chip's FIFO.
    pub received: Vec<u8>,
    /// Not yet in the FIFO.
    pub waiting: Vec<u8>,
}

impl SavedForm for SerialV1 {
    const KIND: &'static str = "serial";
    const VERSION: u32 = 1;
}

impl SerialV1 {
    pub(super) fn new(state: &SerialState, waiting: Vec<u8>) -> Self {
        Self {
            divisor_low: state.baud_divisor_low,
            divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            modem_control: state.modem_control,
            line_status: state.line_status,
            modem_status: state.modem_status,
            scratch: state.scratch,
            received: state.in_buffer.clone(),
            waiting,
        }
    }

    pub(super) fn into_parts(self) -> Result<(SerialState, VecDeque<u8>), SavedError> {
        if self.waiting.len() > super::INPUT_BYTES_MAX {
            let why = format!("{} bytes of input are more than possible", self.waiting.len());
            return Err(SavedError::Mismatch { kind: Self::KIND.into(), why });
        }
        let state = SerialState {
            baud_divisor_low: self.divisor_low,
            baud_divisor_high: self.divisor_high,
            interrupt_enable: self.interrupt_enable,
            interrupt_identification: self.interrupt_identification,
            line_control: self.line_control,
            line_status: self.line_status,
            modem_control: self.modem_control,
            modem_status: self.modem_status,
            scratch: self.scratch,
            in_buffer: self.received,
        };
        Ok((state, self.waiting.into()))
    }
}
