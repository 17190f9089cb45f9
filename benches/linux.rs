//! What booting Linux costs: `cargo xtask bench linux`.

fn main() -> std::process::ExitCode {
    umbra_benches::linux::main()
}
