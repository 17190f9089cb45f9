//! The nested host with SVM: Debian's Linux on QEMU's software CPU.

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs::File;
use std::io::BufWriter;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::initrd::Initrd;
use super::packages::{self, Kernel, Program};
use super::watch::{self, Ended, Output, Ports, Watch};
use crate::context::Context;
use crate::process::{Command, TemporaryFolder};
use crate::progress::Progress;

/// What its first program does with the command.
const INIT: &str = include_str!("svm.sh");
/// The modules that it loads, with parameters: nobody needs a third level of virtual machines.
const MODULES: [(&str, &str); 6] = [
    ("kvm_amd", "nested=0"),
    ("virtio_pci", ""),
    ("virtio_console", ""),
    ("9pnet_virtio", ""),
    ("9p", ""),
    ("overlay", ""),
];
/// A host that does not say "ready" within this time never will.
const BOOT: Duration = Duration::from_secs(300);

/// All that a nested host is made of.
pub struct Host {
    workspace: PathBuf,
    qemu: Program,
    kernel: Kernel,
    busybox: PathBuf,
}

/// What to run in a nested host, and how.
pub struct Job {
    /// A script for `/bin/sh`.
    pub script: Vec<u8>,
    /// One instruction is one nanosecond.
    pub icount: bool,
    /// Memory of the host.
    pub memory_mib: u32,
    /// For all of it.
    pub timeout: Duration,
}

/// A word between the quotes of a shell. A name that is not UTF-8 is not kept.
pub fn quoted(word: &OsStr) -> String {
    format!("'{}'", word.to_string_lossy().replace('\'', "'\\''"))
}

/// A script that runs a command in the current folder, with the current environment.
pub fn in_this_place(command: &[OsString]) -> Result<Vec<u8>> {
    let folder = std::env::current_dir().context("the current folder is gone")?;
    let words: Vec<_> = command.iter().map(|word| quoted(word)).collect();
    let script = format!("cd {} || exit 2\nexec {}\n", quoted(folder.as_os_str()), words.join(" "));
    Ok(with_this_environment(script.as_bytes()))
}

/// A script that runs in the current environment.
pub fn with_this_environment(script: &[u8]) -> Vec<u8> {
    let mut whole = String::new();
    for (name, value) in std::env::vars_os() {
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let name = name.to_string_lossy();
        // There is another /tmp.
        if name != "TMPDIR" && name.chars().all(is_name) && !name.starts_with(char::is_numeric) {
            let _ = writeln!(whole, "export {name}={}", quoted(&value));
        }
    }
    let mut whole = whole.into_bytes();
    whole.extend(script);
    whole
}

impl Host {
    /// Fetches what is missing.
    ///
    /// # Errors
    ///
    /// QEMU or Debian's kernel are neither there nor to be had; the message says what to do.
    pub fn prepare(context: &Context) -> Result<Self> {
        let advice = "the nested host is made of Debian's packages qemu-system-x86, \
                      linux-image-amd64 and busybox-static";
        let parts = || -> Result<_> {
            Ok((packages::qemu(context)?, packages::kernel(context)?, packages::busybox(context)?))
        };
        let (qemu, kernel, busybox) = parts().context(advice)?;
        Ok(Self { workspace: context.root.clone(), qemu, kernel, busybox })
    }

    /// What figures of this host depend on: the versions of QEMU and of the kernel.
    pub fn versions(&self) -> String {
        format!("{}; Linux {}", self.qemu.version, self.kernel.release)
    }

    /// Boots it, runs a job, and waits for the end.
    ///
    /// # Errors
    ///
    /// The host cannot be started at all.
    pub fn run(&self, job: &Job, progress: &Progress, output: Output<'_>) -> Result<Ended> {
        let folder = TemporaryFolder::new()?;
        let initrd = folder.path().join("initrd");
        self.write_initrd(&initrd, job).context("cannot write the nested host's first files")?;
        let console = folder.path().join("console");
        let (streams, ports) = watch::pipes(&output)?;
        let mut qemu = self.qemu(job, &initrd, &console, &ports);
        let running = qemu.start(&ports)?;
        drop(ports);
        let (begin, timeout, logs) = (Instant::now(), job.timeout, [console]);
        Watch { running, begin, boot: BOOT, timeout, logs: &logs, progress }.follow(streams, output)
    }

    /// QEMU's command line. `ports` are the command's standard output and error, and control.
    fn qemu(&self, job: &Job, initrd: &Path, console: &Path, ports: &Ports) -> Command {
        let mut command = Command::new(&self.qemu.path, &self.workspace);
        for (name, value) in &self.qemu.variables {
            command.env(name, value);
        }
        for folder in &self.qemu.data {
            command.args([OsStr::new("-L"), folder.as_os_str()]);
        }
        if job.icount {
            command.args(["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off"]);
        } else {
            command.args(["-accel", "tcg,thread=multi"]);
        }
        // More than one CPU, and QEMU 7.2 corrupts the host's kernel when guests give memory back.
        command.args(["-machine", "pc", "-cpu", "max,+svm", "-smp", "1"]);
        command.args(["-m", &job.memory_mib.to_string()]);
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-vga",
            "none",
            "-display",
            "none",
            "-no-reboot",
        ]);
        let mut parameters = "console=ttyS0 quiet panic=-1 mitigations=off".to_owned();
        if !job.icount {
            // A periodic tick. QEMU's SVM changes the CPU's pending interrupts without a lock and
            // may lose one. The next tick brings it back; a timer that fires once has no next one.
            // With `-icount` all of it is done by one thread, and ticks would only cost.
            parameters += " nohz=off highres=off";
        }
        command.args(["-append", &parameters]);
        command.args([OsStr::new("-kernel"), self.kernel.image.as_os_str()]);
        command.args([OsStr::new("-initrd"), initrd.as_os_str()]);
        command.args(["-serial".into(), option("file:", console, "")]);
        command.args(["-device", "virtio-serial-pci"]);
        for (port, fd) in ports.iter().enumerate() {
            let (set, fd) = (port + 1, fd.as_raw_fd());
            command.args(["-add-fd", &format!("fd={fd},set={set}")]);
            // To append: QEMU cuts a file off otherwise, which a pipe cannot be.
            let to = format!("file,id=port{set},path=/dev/fdset/{set},append=on");
            command.args(["-chardev", &to]);
            command.args(["-device", &format!("virtserialport,nr={set},chardev=port{set}")]);
        }
        let target = self.workspace.join("target");
        for (tag, folder, access) in [
            ("machine", Path::new("/"), "readonly=on,"),
            ("workspace", &self.workspace, "readonly=on,"),
            ("target", &target, ""),
        ] {
            let settings = format!(",mount_tag={tag},security_model=none,{access}multidevs=remap");
            command.args(["-virtfs".into(), option("local,path=", folder, &settings)]);
        }
        command
    }

    fn write_initrd(&self, file: &Path, job: &Job) -> Result<()> {
        let initrd = Initrd {
            busybox: &self.busybox,
            kernel: &self.kernel,
            modules: &MODULES,
            specific: INIT,
            ports: ["/dev/vport0p1", "/dev/vport0p2", "/dev/vport0p3"],
            script: &job.script,
        };
        let mut archive = initrd.write(BufWriter::new(File::create(file)?))?;
        archive.folder("machine")?;
        archive.file("job/workspace", false, self.workspace.as_os_str().as_encoded_bytes())?;
        archive.finish()?;
        Ok(())
    }
}

/// An option of QEMU's with a path in it, in which a comma is doubled.
fn option(before: &str, path: &Path, after: &str) -> OsString {
    let mut option = OsString::from(before);
    for (number, part) in path.to_string_lossy().split(',').enumerate() {
        if number > 0 {
            option.push(",,");
        }
        option.push(part);
    }
    option.push(after);
    option
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_shell() {
        let words: Vec<OsString> =
            ["printf", "%s|", "a b", "it's", "$HOME", "\\", ""].map(Into::into).into();
        let script = in_this_place(&words).unwrap();
        let script = std::str::from_utf8(&script).unwrap();
        let mut shell = std::process::Command::new("/bin/sh");
        let output = shell.arg("-c").arg(script).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "a b|it's|$HOME|\\||");
    }

    #[test]
    fn paths_in_options_may_have_commas() {
        assert_eq!(option("file:", Path::new("/a,b"), ",x"), "file:/a,,b,x");
    }
}
