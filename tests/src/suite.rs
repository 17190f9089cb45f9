//! A list of tests that is made at run time, and says of each test that it skips why.

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

/// Something that a test may need and a machine may lack.
#[derive(Clone, Debug)]
pub enum Need {
    /// It is there.
    There,
    /// It is not; why, in a few words.
    Missing(String),
}

impl Need {
    /// From the reason why something is missing, if it is.
    pub fn unless(missing: Option<String>) -> Self {
        missing.map_or(Self::There, Self::Missing)
    }

    /// Both.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        match self {
            Self::There => other.clone(),
            Self::Missing(_) => self.clone(),
        }
    }

    /// A usable `/dev/kvm`.
    pub fn kvm() -> Self {
        Self::unless(umbra::machine::Kvm::open().err().map(|error| error.to_string()))
    }

    /// A usable `/dev/kvm` and the test kernel.
    pub fn test_kernel() -> Self {
        let built = umbra::kernel::test_kernel().is_some();
        let missing =
            (!built).then(|| "the test kernel was not built: `cargo xtask guest` does".to_owned());
        Self::kvm().and(&Self::unless(missing))
    }

    /// The user's wish for tests that take very long; `missing` says how to wish for this one.
    pub fn long(missing: &str) -> Self {
        Self::unless(std::env::var_os("UMBRA_LONG_TESTS").is_none().then(|| missing.to_owned()))
    }

    /// Whether a program is in the path.
    pub fn has(program: &str) -> bool {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
    }

    /// Root.
    pub fn root() -> Self {
        // SAFETY: only asks.
        let root = unsafe { libc::geteuid() } == 0;
        Self::unless((!root).then(|| "only root can do this".into()))
    }
}

/// A list of tests.
#[derive(Default)]
pub struct Suite {
    /// The tests, and why they cannot run here, if so.
    trials: Vec<(Trial, Option<String>)>,
}

impl Suite {
    /// Adds a test. Where what it needs is missing, it counts as ignored and its name is printed
    /// with the reason.
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
