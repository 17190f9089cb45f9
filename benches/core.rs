//! The core's figures: `cargo bench -p umbra-benches`.

fn main() -> std::process::ExitCode {
    umbra_benches::suite::main()
}
