//! The nested host with VMX: Debian's Linux on Bochs' CPU.
//!
//! Bochs shares no folders with this machine and boots from a CD only. So the command's files go
//! into the first root file system, which goes on a CD with the kernel and GRUB.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufWriter, PipeWriter, Write as _};
use std::os::fd::AsRawFd as _;
use std::path::{Component, Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::initrd::Initrd;
use super::packages::{self, Kernel};
use super::watch::{self, Ended, Output, Ports, Watch};
use crate::context::Context;
use crate::process::{Command, Running, TemporaryFolder};

/// The specific part of its first program.
const INIT: &str = include_str!("vmx.sh");
/// The module that it loads, with parameters.
const MODULES: [(&str, &str); 1] = [("kvm_intel", "nested=0")];
/// GRUB's menu. The kernel cannot measure clocks here. Its self-tests and the preparation of
/// tracing are off: they would take most of its instructions. It reboots by a triple fault, which
/// ends Bochs.
const MENU: &str = "\
set timeout=0
menuentry host {
    linux /boot/kernel console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable \
clocksource=tsc lpj=4000000 no_timer_check reboot=triple cryptomgr.notests nosoftlockup \
initcall_blacklist=ftrace_check_for_weak_functions,trace_eval_init,tracer_init_tracefs
    initrd /boot/initrd
}
";
/// Input of Bochs' debugger: continue; and quit once the host is off.
const DEBUGGER: &[u8] = b"c\nquit\n";

/// The parts of the host.
pub struct VmxHost {
    /// Bochs and GRUB, unpacked.
    programs: PathBuf,
    kernel: Kernel,
    busybox: PathBuf,
}

/// What to run, and how.
pub struct VmxJob {
    /// The command's words. Words that name files of this machine are copied.
    pub command: Vec<OsString>,
    /// A script for `/bin/sh` that runs it.
    pub script: Vec<u8>,
    pub memory_mib: u32,
    /// Time limit of the run.
    pub timeout: Duration,
}

impl VmxHost {
    /// Fetches what is missing.
    ///
    /// # Errors
    ///
    /// Bochs, GRUB or Debian's kernel are not to be had; the message says what to do.
    pub fn prepare(context: &Context) -> Result<Self> {
        let advice = "the nested host with VMX is made of Debian's packages bochs, bochs-term, \
                      bochsbios, vgabios, grub-pc-bin, grub-common, xorriso, linux-image-amd64 and \
                      busybox-static";
        let parts = || -> Result<_> {
            let programs = packages::bochs(context)?;
            Ok(Self {
                programs,
                kernel: packages::kernel(context)?,
                busybox: packages::busybox(context)?,
            })
        };
        parts().context(advice)
    }

    /// Boots it, runs a job, passes on its output, and waits for the end.
    ///
    /// # Errors
    ///
    /// The host cannot be started at all.
    pub fn run(&self, context: &Context, job: &VmxJob) -> Result<Ended> {
        let folder = TemporaryFolder::new()?;
        let logs = ["console", "log"].map(|name| folder.path().join(name));
        self.write_cd(context, job, folder.path())?;
        let (streams, ports) = watch::pipes(&Output::PassedOn)?;
        let file = folder.path().join("bochsrc");
        let text = configuration(&self.programs, job.memory_mib, &ports);
        fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
        context.progress.step("booting the nested host, for which Bochs takes minutes");
        let (running, _to_debugger) = self.start(folder.path(), &ports)?;
        drop(ports);
        let (begin, timeout, progress) = (Instant::now(), job.timeout, &context.progress);
        // The boot time of Bochs varies too much between machines for its own limit.
        Watch { running, begin, boot: timeout, timeout, logs: &logs, progress }
            .follow(streams, Output::PassedOn)
    }

    /// Starts Bochs in a folder. Its debugger ends it when the pipe to it is dropped.
    fn start(&self, folder: &Path, ports: &Ports) -> Result<(Running, PipeWriter)> {
        let (input, mut to_debugger) = io::pipe()?;
        to_debugger.write_all(DEBUGGER)?;
        let mut bochs = self.program("bochs-bin", folder)?;
        let plugins = self.programs.join("usr/lib/x86_64-linux-gnu/bochs/plugins");
        bochs.env("LTDL_LIBRARY_PATH", plugins).args(["-q", "-f", "bochsrc"]);
        Ok((bochs.start_with(input.into(), Stdio::null(), ports)?, to_debugger))
    }

    /// An unpacked program, to run in a folder.
    fn program(&self, name: &str, folder: &Path) -> Result<Command> {
        let programs = self.programs.join("usr/bin");
        let mut command = Command::new(programs.join(name), folder);
        let (variable, libraries) = packages::libraries(&self.programs)?;
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::iter::once(programs).chain(std::env::split_paths(&path));
        command.env(variable, libraries).env("PATH", std::env::join_paths(path)?);
        command.env("TMPDIR", folder);
        Ok(command)
    }

    /// Makes a CD of this name in a folder.
    fn write_cd(&self, context: &Context, job: &VmxJob, folder: &Path) -> Result<()> {
        context.progress.step("writing a CD for the nested host");
        let write = || -> Result<()> {
            let boot = folder.join("cd/boot");
            fs::create_dir_all(boot.join("grub"))?;
            fs::write(boot.join("grub/grub.cfg"), MENU)?;
            fs::copy(&self.kernel.image, boot.join("kernel"))?;
            self.write_initrd(context, job, &boot.join("initrd"))
        };
        write().context("cannot write the nested host's first files")?;
        let mut command = self.program("grub-mkrescue", folder)?;
        command.args(["--directory".into(), self.programs.join("usr/lib/grub/i386-pc")]);
        command.args(["--fonts=", "--themes=", "--locales=", "--output=cd.iso", "cd"]);
        command.run_or_fail(&context.progress)?;
        Ok(())
    }

    fn write_initrd(&self, context: &Context, job: &VmxJob, file: &Path) -> Result<()> {
        let initrd = Initrd {
            busybox: &self.busybox,
            kernel: &self.kernel,
            modules: &MODULES,
            specific: INIT,
            ports: ["/dev/ttyS1", "/dev/ttyS2", "/dev/ttyS3"],
            script: &job.script,
        };
        let mut archive = initrd.write(BufWriter::new(File::create(file)?))?;
        let folder = std::env::current_dir().context("the current folder is gone")?;
        archive.folder(&in_archive(&folder))?;
        for word in &job.command {
            let path = folder.join(word);
            if !path.is_file() {
                continue;
            }
            for path in std::iter::once(path.clone()).chain(libraries(context, &path)?) {
                let bytes = fs::read(&path);
                let bytes = bytes.with_context(|| format!("cannot read {}", path.display()))?;
                archive.file(&in_archive(&path), true, &bytes)?;
            }
        }
        archive.finish()?;
        Ok(())
    }
}

/// The libraries that a program is linked with; none for other files.
fn libraries(context: &Context, file: &Path) -> Result<Vec<PathBuf>> {
    let said = context.program(Path::new("ldd")).args([file]).stream(|_| {})?;
    Ok(if said.success { said.output.lines().filter_map(library).collect() } else { Vec::new() })
}

/// The path in a line of ldd's: `NAME => PATH (ADDRESS)`, or without the name.
fn library(line: &str) -> Option<PathBuf> {
    let line = line.split_once(" => ").map_or(line, |(_, path)| path);
    let path = line.trim().rsplit_once(" (")?.0;
    path.starts_with('/').then(|| path.into())
}

/// An absolute path as in the archive: relative to the root, and without links.
fn in_archive(path: &Path) -> String {
    let mut names: Vec<String> = Vec::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => names.push(name.to_string_lossy().into_owned()),
            Component::ParentDir => drop(names.pop()),
            _ => {}
        }
    }
    names.join("/")
}

/// Bochs' configuration: serial ports are the console and the pipes, in this order.
fn configuration(programs: &Path, memory_mib: u32, ports: &Ports) -> String {
    let firmware = programs.join("usr/share");
    let (bios, vga) = ("bochs/BIOS-bochs-latest", "vgabios/vgabios.bin");
    let [out, err, control] =
        ports.each_ref().map(|fd| format!("/proc/self/fd/{}", fd.as_raw_fd()));
    // By default, unknown registers end Bochs; not here. It must not wait for clocks, or for a
    // viewer of its screen. Its other displays need a terminal, or have one.
    format!(
        "cpu: model=corei7_skylake_x, count=1, ips=100000000\n\
         cpu: ignore_bad_msrs=1, reset_on_triple_fault=0\n\
         memory: guest={memory_mib}, host={memory_mib}\n\
         romimage: file=\"{bios}\"\n\
         vgaromimage: file=\"{vga}\"\n\
         plugin_ctrl: unmapped=1, biosdev=1, extfpuirq=1, serial=1\n\
         plugin_ctrl: speaker=0, parallel=0, iodebug=0\n\
         ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14\n\
         ata0-master: type=cdrom, path=cd.iso, status=inserted\n\
         boot: cdrom\n\
         com1: enabled=1, mode=file, dev=console\n\
         com2: enabled=1, mode=file, dev={out}\n\
         com3: enabled=1, mode=file, dev={err}\n\
         com4: enabled=1, mode=file, dev={control}\n\
         clock: sync=none\n\
         display_library: rfb, options=\"timeout=0\"\n\
         panic: action=fatal\n\
         log: log\n",
        bios = firmware.join(bios).display(),
        vga = firmware.join(vga).display(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_what_ldd_says() {
        let said = [
            "\tlinux-vdso.so.1 (0x00007fe132342000)",
            "\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007fe13181e000)",
            "\t/lib64/ld-linux-x86-64.so.2 (0x00007fe132344000)",
            "\tlibnone.so => not found",
            "\tnot a dynamic executable",
        ];
        let paths: Vec<_> = said.iter().filter_map(|line| library(line)).collect();
        let expected = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"];
        assert_eq!(paths, expected.map(PathBuf::from));
    }

    #[test]
    fn paths_are_where_the_host_looks_them_up() {
        assert_eq!(in_archive(Path::new("/a/b/./../c/d")), "a/c/d");
        assert_eq!(in_archive(Path::new("/")), "");
    }

    #[test]
    fn each_stream_has_a_port() {
        let (_streams, ports) = watch::pipes(&Output::PassedOn).unwrap();
        let text = configuration(Path::new("/x y"), 2048, &ports);
        for (number, port) in ports.iter().enumerate() {
            let com = number + 2;
            let line =
                format!("com{com}: enabled=1, mode=file, dev=/proc/self/fd/{}\n", port.as_raw_fd());
            assert!(text.contains(&line), "{text}");
        }
        assert!(text.contains("memory: guest=2048, host=2048\n"), "{text}");
        assert!(text.contains("file=\"/x y/usr/share/bochs/BIOS-bochs-latest\"\n"), "{text}");
    }
}
