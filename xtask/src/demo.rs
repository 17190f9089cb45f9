//! `cargo xtask demo`: builds everything and becomes `umbra demo`.
use std::process::ExitCode;
use anyhow::Result;
use crate::Context;
pub fn run(context: &Context, arguments: &[String]) -> Result<ExitCode> { let _ = (context, arguments); todo!() }
