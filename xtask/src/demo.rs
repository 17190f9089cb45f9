//! `cargo xtask demo`: builds everything and executes `umbra demo`, in the nested host if there is
//! no KVM.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io;
use std::process::ExitCode;

use anyhow::Result;

use crate::context::Context;
use crate::programs::UMBRA;
use crate::{nested, programs};

/// Runs the demo. With KVM, returns only on failure.
pub fn run(context: &Context, arguments: &[String]) -> Result<ExitCode> {
    let boots =
        !arguments.iter().any(|argument| ["--list", "--help", "-h"].contains(&argument.as_str()));
    let arguments = &with_folder(context, arguments, boots);
    let problem = kvm_problem().filter(|_| boots);
    if let Some(problem) = &problem {
        context.progress.say(&format!("the demo runs in the nested host: {problem}"));
    }
    let program = programs::umbra(context)?;
    if problem.is_some() {
        let mut command: Vec<OsString> = vec![program.into(), "demo".into()];
        command.extend(arguments.iter().map(OsString::from));
        return nested::run_command(context, &command);
    }
    context.progress.step("starting the demo");
    context.progress.finish();
    // cargo knows where the program is, whatever its target folder.
    let run = ["run", "--quiet"];
    context.cargo().args(run).args(UMBRA).args(["--", "demo"]).args(arguments).replace()
}

/// The arguments, with a folder for all findings if they name none.
fn with_folder(context: &Context, arguments: &[String], boots: bool) -> Vec<String> {
    let names_one = |argument: &String| argument == "--out" || argument.starts_with("--out=");
    let mut all = arguments.to_vec();
    if boots && !arguments.iter().any(names_one) {
        let folder = context.root.join("target/demo");
        all.extend(["--out".to_owned(), folder.to_string_lossy().into_owned()]);
    }
    all
}

/// The reason why guests cannot be booted on this machine, if any, and what to do about it.
pub fn kvm_problem() -> Option<String> {
    OpenOptions::new().read(true).write(true).open("/dev/kvm").err().as_ref().map(describe)
}

const NO_KVM: &str = "\
    there is no /dev/kvm: enable virtualization (VT-x or AMD-V) in the firmware and load kvm_intel \
    or kvm_amd, or nested KVM where this is a virtual machine, or pass the device into the \
    container where this is one";
const NO_PERMISSION: &str = "\
    no permission to use /dev/kvm: join the group that owns it (`sudo usermod -aG kvm $USER`) and \
    log in again";

fn describe(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => NO_KVM.into(),
        io::ErrorKind::PermissionDenied => NO_PERMISSION.into(),
        _ => format!("/dev/kvm cannot be used: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_kvm_is_said_with_its_remedy() {
        let said = |kind: io::ErrorKind| describe(&kind.into());
        assert!(said(io::ErrorKind::NotFound).contains("enable virtualization"));
        assert!(said(io::ErrorKind::PermissionDenied).contains("usermod -aG kvm"));
        assert!(describe(&io::Error::from_raw_os_error(libc::ENODEV)).contains("No such device"));
    }
}
