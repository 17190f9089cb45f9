//! `cargo xtask test`: builds everything and becomes `umbra demo`.
use crate::Context;
use anyhow::Result;
use std::process::ExitCode;
pub fn run(context: &Context, arguments: &[String]) -> Result<ExitCode> {
    let _ = (context, arguments);
    todo!()
}
