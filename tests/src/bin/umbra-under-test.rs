//! The program `umbra`, built once more as part of this package: so that its tests always run the
//! present one.

use std::process::ExitCode;

fn main() -> ExitCode {
    umbra::cli::main()
}
