//! What a whole host spends, hardware's kind of KVM included: `cargo xtask bench nested`.

fn main() -> std::process::ExitCode {
    umbra_benches::nested::main()
}
