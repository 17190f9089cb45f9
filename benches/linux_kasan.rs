//! Linux without KASAN, with its own, and with Umbra's: `cargo xtask linux compare`.

fn main() -> std::process::ExitCode {
    umbra_benches::linux_kasan::main()
}
