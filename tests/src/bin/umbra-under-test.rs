//! The program `umbra`, built again as part of this package, so that its tests always run the
//! current one.

use std::process::ExitCode;

fn main() -> ExitCode {
    umbra::cli::main()
}
