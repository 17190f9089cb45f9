//! Runs the program `umbra` as a process of its own.

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use umbra_shadow::abi::{CallNumber, PORT};

/// Folder for the figures as JSON, and for the files of the programs that are run.
pub(crate) const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bench");

/// The built program, and a folder for what it reads and writes.
pub struct Program {
    program: PathBuf,
    folder: PathBuf,
}

impl Program {
    /// Builds the program. Its files go to `folder`.
    ///
    /// # Errors
    /// It cannot be built or found.
    pub fn build(folder: &Path) -> Result<Self> {
        let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let status = Command::new(cargo)
            .args(["build", "--quiet", "--release", "--package", "umbra", "--bin", "umbra"])
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
            .status()
            .context("cannot start cargo to build umbra")?;
        ensure!(status.success(), "umbra cannot be built: {status}");
        // This program is in target/release/deps.
        let this = env::current_exe().context("this program's path is unknown")?;
        let program = this
            .ancestors()
            .nth(2)
            .context("this program is not where cargo puts it")?
            .join("umbra");
        ensure!(program.is_file(), "umbra is not at {}", program.display());
        Ok(Self { program, folder: folder.to_owned() })
    }

    /// The folder for what it reads and writes.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where the program is.
    pub fn path(&self) -> &Path {
        &self.program
    }

    /// Runs a kernel in 256 MiB. Returns the figures of `--stats`.
    ///
    /// # Errors
    /// It cannot be started, or ends with another status than `expected`.
    pub fn stats(&self, kernel: &[u8], cmdline: &str, expected: i32) -> Result<Value> {
        let file = self.folder.join("kernel");
        let stats = self.folder.join("stats.json");
        fs::write(&file, kernel).with_context(|| format!("cannot write {}", file.display()))?;
        let arguments: [&OsStr; 8] = [
            "run".as_ref(),
            file.as_ref(),
            "--keep-going".as_ref(),
            "--timeout=600s".as_ref(),
            "--cmdline".as_ref(),
            cmdline.as_ref(),
            "--stats".as_ref(),
            stats.as_ref(),
        ];
        self.run(&arguments, expected)?;
        let text = fs::read(&stats).with_context(|| format!("cannot read {}", stats.display()))?;
        serde_json::from_slice(&text).context("--stats is not JSON")
    }

    /// Runs a kernel that ends at once, with `memory` bytes. Returns the figures of `--stats`.
    ///
    /// # Errors
    /// It cannot be started, or does not end well.
    pub fn bare(&self, memory: u64, shadow: &str) -> Result<Value> {
        let (file, stats) = (self.folder.join("exits-at-once"), self.folder.join("stats.json"));
        fs::write(&file, exits_at_once())
            .with_context(|| format!("cannot write {}", file.display()))?;
        let (memory, shadow) =
            (format!("--memory={}M", memory >> 20), format!("--shadow={shadow}"));
        let arguments: [&OsStr; 6] = [
            "run".as_ref(),
            file.as_ref(),
            memory.as_ref(),
            shadow.as_ref(),
            "--stats".as_ref(),
            stats.as_ref(),
        ];
        self.run(&arguments, 0)?;
        let text = fs::read(&stats).with_context(|| format!("cannot read {}", stats.display()))?;
        serde_json::from_slice(&text).context("--stats is not JSON")
    }

    /// Median time from the start of the process to its end, for `times` runs of a kernel that ends
    /// at once, in 256 MiB. It bounds the time to the guest's first instruction.
    ///
    /// # Errors
    /// As [`Program::stats`].
    pub fn start_to_end(&self, times: usize) -> Result<Duration> {
        let file = self.folder.join("exits-at-once");
        fs::write(&file, exits_at_once())
            .with_context(|| format!("cannot write {}", file.display()))?;
        let mut all = Vec::with_capacity(times);
        for _ in 0..times {
            let begin = Instant::now();
            self.run(&["run".as_ref(), file.as_ref()], 0)?;
            all.push(begin.elapsed());
        }
        all.sort();
        all.get(times / 2).copied().context("no runs")
    }

    fn run(&self, arguments: &[&OsStr], expected: i32) -> Result<()> {
        let status = Command::new(&self.program)
            .args(arguments)
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .with_context(|| format!("cannot start {}", self.program.display()))?;
        ensure!(status.code() == Some(expected), "umbra {arguments:?} ended with {status}");
        Ok(())
    }
}

/// A process that is killed when this value is dropped or this program ends.
pub struct Running(Child);

impl Running {
    /// Its process id.
    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// Stops it (`SIGSTOP`).
    pub fn stop(&self) {
        // SAFETY: `kill` touches no memory; the process is a child that was not waited for, so the
        // id is its own.
        unsafe { libc::kill(self.0.id().cast_signed(), libc::SIGSTOP) };
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a command and waits for the `times`th line of its output that contains `text`. Returns
/// the running process and the time until then.
///
/// # Errors
/// It cannot be started, ends before, or takes longer than `limit`.
pub fn until(
    command: &mut Command,
    text: &str,
    times: usize,
    limit: Duration,
) -> Result<(Running, Duration)> {
    let name = command.get_program().display().to_string();
    command
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    // SAFETY: `prctl` may be called between `fork` and `exec`, and takes no memory.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        })
    };
    let begin = Instant::now();
    let mut child = Running(command.spawn().with_context(|| format!("cannot start {name}"))?);
    let (told, tells) = mpsc::channel();
    let out = child.0.stdout.take().context("no standard output")?;
    let err = child.0.stderr.take().context("no standard error")?;
    let wanted = text.to_owned();
    // Both read to the end, so that the process does not wait for a reader.
    let complaints = thread::spawn(move || {
        let lines = BufReader::new(err).lines().map_while(Result::ok);
        lines.filter(|line| line.contains("rror")).take(1).collect::<Vec<_>>()
    });
    thread::spawn(move || {
        let lines = BufReader::new(out).lines().map_while(Result::ok);
        for line in lines.filter(|line| line.contains(&wanted)) {
            if told.send((line, Instant::now())).is_err() {
                break;
            }
        }
    });
    let mut at = begin;
    for _ in 0..times {
        let left = limit.saturating_sub(begin.elapsed());
        at = match tells.recv_timeout(left) {
            Ok((_, at)) => at,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                anyhow::bail!("{name} did not get there in {} s", limit.as_secs())
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                drop(child);
                let said = complaints.join().unwrap_or_default().pop();
                anyhow::bail!("{}", said.unwrap_or_else(|| format!("{name} ended before")))
            }
        };
    }
    Ok((child, at - begin))
}

/// An ELF kernel of one segment: `code`, entered at its start.
pub fn one_segment(code: &[u8]) -> Vec<u8> {
    const LOAD: u64 = 1 << 20;
    // 120 bytes, padded to align the code.
    const HEADERS: u64 = 128;
    let bytes = HEADERS + code.len() as u64;
    // Elf64_Ehdr: ELF, 64 bits, little endian, version 1; executable, x86_64, version 1.
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    // Entry, program headers, section headers; flags, sizes of this header and of a program header,
    // one of these, no sections.
    for word in [LOAD + HEADERS, 64, 0] {
        file.extend_from_slice(&u64::to_le_bytes(word));
    }
    file.extend_from_slice(&[0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0]);
    // Elf64_Phdr: PT_LOAD, readable and executable; offset, addresses, sizes, alignment.
    file.extend_from_slice(&[1, 0, 0, 0, 5, 0, 0, 0]);
    for word in [0, LOAD, LOAD, bytes, bytes, 4096] {
        file.extend_from_slice(&u64::to_le_bytes(word));
    }
    file.resize(HEADERS as usize, 0);
    file.extend_from_slice(code);
    file
}

/// A kernel whose first instructions end the run.
pub(crate) fn exits_at_once() -> Vec<u8> {
    exits_after(0)
}

/// A kernel that writes `count` times to an unused port and ends the run.
pub(crate) fn exits_after(count: u64) -> Vec<u8> {
    // mov rcx, count; test rcx, rcx; jz 2f; 1: out 0x80, al; dec rcx; jnz 1b; 2:
    let mut code = vec![0x48, 0xb9];
    code.extend_from_slice(&count.to_le_bytes());
    code.extend([0x48, 0x85, 0xc9, 0x74, 0x07, 0xe6, 0x80, 0x48, 0xff, 0xc9, 0x75, 0xf9]);
    // xor edi, edi; xor esi, esi; mov eax, EXIT; mov edx, PORT; out dx, eax
    code.extend([0x31, 0xff, 0x31, 0xf6, 0xb8]);
    code.extend_from_slice(&u32::from(CallNumber::Exit).to_le_bytes());
    code.push(0xba);
    code.extend_from_slice(&u32::from(PORT).to_le_bytes());
    code.push(0xef);
    one_segment(&code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hand_made_kernel_has_the_size_that_its_headers_say() {
        let file = exits_at_once();
        let word = |at: usize| u64::from_le_bytes(file[at..at + 8].try_into().unwrap());
        assert_eq!(word(24), (1 << 20) + 128, "the entry is behind the headers");
        assert_eq!(word(64 + 32), file.len() as u64, "bytes in the file");
        assert_eq!(&file[128..130], [0x48, 0xb9]);
    }
}
