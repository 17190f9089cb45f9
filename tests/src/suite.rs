//! A list of tests that is made at run time. It prints why it skips a test.

use std::path::Path;
use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};
use umbra::machine::Kvm;
use umbra::machine::loader::LoadError;
use umbra::machine::probe::runs_programs;
use umbra::machine::stats::emulates_ring0;
use umbra::sandbox::GuestFile;

/// Something that a test may need and a machine may lack.
#[derive(Clone, Debug)]
pub enum Need {
    /// It is there.
    There,
    /// It is missing, for this reason.
    Missing(String),
    /// The test belongs to another host, which `cargo xtask test` runs too.
    Elsewhere,
}

/// Whether KVM emulates ring 0 here.
fn ring0_is_emulated() -> bool {
    Kvm::open().is_ok_and(|kvm| emulates_ring0(&kvm).unwrap_or(false))
}

/// The test kernel whose compiler checks inline, if it was built.
///
/// # Errors
/// It was not, or cannot be read.
pub fn inline_kernel() -> Result<GuestFile, LoadError> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guest");
    GuestFile::open("test kernel", &folder.join("umbra-kernel-inline"))
}

fn host_is(host: &str) -> bool {
    std::env::var_os(umbra_skip::HOST).is_some_and(|value| value == host)
}

impl Need {
    /// There, unless `missing` has a reason.
    pub fn unless(missing: Option<String>) -> Self {
        missing.map_or(Self::There, Self::Missing)
    }

    /// Both.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        match self {
            Self::There => other.clone(),
            // A test that runs elsewhere lacks nothing here.
            Self::Missing(_) if matches!(other, Self::Elsewhere) => other.clone(),
            Self::Missing(_) | Self::Elsewhere => self.clone(),
        }
    }

    /// A usable `/dev/kvm`.
    pub fn kvm() -> Self {
        Self::unless(Kvm::open().err().map(|error| error.to_string()))
    }

    /// A usable `/dev/kvm` and the test kernel.
    pub fn test_kernel() -> Self {
        let built = umbra::kernel::test_kernel().is_some();
        let missing =
            (!built).then(|| "the test kernel was not built: `cargo xtask guest` does".to_owned());
        Self::kvm().and(&Self::unless(missing))
    }

    /// A usable `/dev/kvm` and the test kernel whose compiler checks inline.
    pub fn inline_kernel() -> Self {
        let missing = inline_kernel().err().map(|error| format!("{error}: `cargo xtask guest`"));
        Self::kvm().and(&Self::unless(missing))
    }

    /// The machine itself. The nested host's emulated CPU would take minutes: a big program runs
    /// beside the guest, or the guest exits a hundred thousand times.
    pub fn machine() -> Self {
        if host_is("svm") { Self::Elsewhere } else { Self::There }
    }

    /// A CPU that is not emulated, for what would take an emulated one an hour, or gives up before.
    /// Where the nested host alone has KVM, there is none for tests with guests.
    pub fn fast_cpu() -> Self {
        let why = "it takes too long on the nested host's emulated CPU";
        Self::machine().and(&Self::unless(host_is("svm-alone").then(|| why.to_owned())))
    }

    /// The nested host, if tests run there too: a Linux guest takes seconds in it, and minutes
    /// where ring 0 is emulated.
    pub fn prefer_nested() -> Self {
        if host_is("machine") { Self::Elsewhere } else { Self::There }
    }

    /// Programs in guests: where KVM emulates ring 0, their system calls do not reach the kernel.
    pub fn programs() -> Self {
        let probed = Kvm::open().map_err(|error| error.to_string()).and_then(|kvm| {
            runs_programs(&kvm).map_err(|error| format!("a probe guest failed: {error}"))
        });
        match probed {
            Ok(true) => Self::There,
            Ok(false) => Self::Missing(
                "a probe guest found that system calls from ring 3 do not reach ring 0 here".into(),
            ),
            Err(error) => Self::Missing(error),
        }
    }

    /// The user's consent to a test that takes an hour where ring 0 is emulated; `wish` tells the
    /// user how.
    pub fn long_if_emulated(wish: &str) -> Self {
        let missing = (!is_long_wished() && ring0_is_emulated())
            .then(|| format!("it takes long where ring 0 is emulated: {wish}"));
        Self::unless(missing)
    }

    /// Root.
    pub fn root() -> Self {
        // SAFETY: only asks.
        let root = unsafe { libc::geteuid() } == 0;
        Self::unless((!root).then(|| "only root can do this".into()))
    }
}

/// Whether tests may take very long: `cargo xtask test --all`.
pub fn is_long_wished() -> bool {
    std::env::var_os("UMBRA_LONG_TESTS").is_some()
}

/// Whether a program is in the path.
pub fn has_program(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// A list of tests.
#[derive(Default)]
pub struct Suite {
    /// The tests, and why they cannot run here, if so.
    trials: Vec<(Trial, Option<String>)>,
}

impl Suite {
    /// Adds a test. Where what it needs is missing, it counts as ignored and its name is printed
    /// with the reason. One of another host is left out.
    pub fn add(
        &mut self,
        name: impl Into<String>,
        need: &Need,
        test: impl FnOnce() + Send + 'static,
    ) {
        let trial = Trial::test(name, move || {
            test();
            Ok(())
        });
        let missing = match need {
            Need::There => None,
            Need::Missing(reason) => Some(reason.clone()),
            Need::Elsewhere => return,
        };
        self.trials.push((trial.with_ignored_flag(missing.is_some()), missing));
    }

    /// Runs the tests that the command line asks for.
    pub fn run(self) -> ExitCode {
        let arguments = Arguments::from_args();
        let asked = |trial: &Trial| {
            !arguments.list && !arguments.is_filtered_out(trial) && arguments.is_ignored(trial)
        };
        for (trial, missing) in &self.trials {
            if let Some(reason) = missing.as_ref().filter(|_| asked(trial)) {
                println!("{}", umbra_skip::line(trial.name(), reason));
            }
        }
        let trials = self.trials.into_iter().map(|(trial, _)| trial).collect();
        libtest_mimic::run(&arguments, trials).exit_code()
    }
}
