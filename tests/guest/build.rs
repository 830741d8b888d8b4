//! Builds the guest's image: a static, bare-metal ELF program, by the same compiler as everything else.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// The pieces of the image that are also part of the library, for tests on the host.
const SHARED: [&str; 2] = ["src/pattern.rs", "src/job.rs"];

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=image");
    for file in SHARED {
        println!("cargo::rerun-if-changed={file}");
    }
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(cause) => {
            println!("cargo::error=the test guest's image cannot be built: {cause}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    let variable = |name: &str| std::env::var_os(name).ok_or(format!("cargo did not set {name}"));
    let image = Path::new(&variable("CARGO_MANIFEST_DIR")?).join("image");
    let output = PathBuf::from(variable("OUT_DIR")?).join("test-guest.elf");
    let script = image.join("link.ld");
    let script = script.to_str().ok_or("the path of the checkout is not UTF-8")?;
    let compiled = Command::new(variable("RUSTC")?)
        .args(["--edition", "2024", "--crate-type", "bin", "--crate-name", "test_guest_image"])
        .args(["--target", "x86_64-unknown-linux-gnu"])
        .args(["-C", "opt-level=3", "-C", "panic=abort", "-C", "relocation-model=static", "-C", "no-redzone=yes"])
        .args(["-C", "link-arg=-nostdlib", "-C", "link-arg=-nostartfiles", "-C", "link-arg=-static"])
        .args(["-C", "link-arg=-no-pie", "-C", "link-arg=-Wl,--build-id=none,-z,max-page-size=4096,-z,noexecstack"])
        .args(["-C", "link-arg=-T", "-C", &format!("link-arg={script}")])
        .args(["-C", "strip=symbols"])
        .arg("-o")
        .arg(&output)
        .arg(image.join("main.rs"))
        .output()
        .map_err(|cause| format!("rustc does not start: {cause}"))?;
    let messages = String::from_utf8_lossy(&compiled.stderr);
    if !compiled.status.success() {
        eprintln!("{messages}");
        return Err(format!("rustc ended with {}; its messages are below", compiled.status));
    }
    messages.lines().for_each(|line| println!("cargo::warning={line}"));
    Ok(())
}
