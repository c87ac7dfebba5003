//! The virtual machine monitor's command line; see `bellwether-vmm --help`.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    bellwether_vmm::cli::main()
}
