//! Links the guest as a bare static ELF, so that one plain `cargo build` is enough from any directory.

use std::path::PathBuf;

fn main() {
    let script = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default())
        .join("link.ld")
        .into_os_string();
    println!("cargo:rerun-if-changed=link.ld");
    println!("cargo:rerun-if-changed=src/boot.s");
    for arg in ["-nostartfiles", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none"] {
        println!("cargo:rustc-link-arg-bins={arg}");
    }
    println!("cargo:rustc-link-arg-bins=-Wl,-z,max-page-size=4096,-z,norelro");
    println!("cargo:rustc-link-arg-bins=-Wl,-T,{}", script.display());
}
