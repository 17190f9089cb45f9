//! The one way to say that something was skipped, which `cargo xtask test` counts.
//!
//! A test that cannot run here ends by [`need!`], [`need_cpu!`] or [`skip!`]. A test that lacks
//! only a part calls [`skip_part!`] and goes on: the part counts as skipped, the test as passed.

use std::fmt::Display;
use std::thread;

const WORD: &str = "SKIPPED: ";

/// The variable in which `cargo xtask test` names the host of a test, so that the test can leave to
/// the other host what belongs there: `machine`, if there is a nested host as well, `svm`, if tests
/// run on the machine as well, or `svm-alone`, if the machine has no KVM. Unset, nothing is left to
/// another host.
pub const HOST: &str = "UMBRA_TEST_HOST";

/// The line about a skipped test: `SKIPPED: what: why`.
pub fn line(what: impl Display, why: impl Display) -> String {
    format!("{WORD}{what}: {why}").replace('\n', " ")
}

/// The part `what: why` of a line about a skipped test. It may begin in the middle, because a
/// harness may print the name of a test without ending the line.
pub fn said(line: &str) -> Option<&str> {
    line.split_once(WORD).map(|(_, said)| said)
}

/// Ends the test as skipped. Takes the reason, like `println!`.
#[macro_export]
macro_rules! skip {
    ($($why:tt)+) => {{
        println!("{}", $crate::line($crate::test_name!(), format_args!($($why)+)));
        return;
    }};
}

/// Marks a part of the test as skipped. Takes the part's name, and the reason like `println!`.
#[macro_export]
macro_rules! skip_part {
    ($part:expr, $($why:tt)+) => {{
        let name = format!("{}/{}", $crate::test_name!(), $part);
        println!("{}", $crate::line(name, format_args!($($why)+)));
    }};
}

/// The value of a `Result`. Ends the test as skipped if it is an error, which is the reason.
#[macro_export]
macro_rules! need {
    ($result:expr) => {
        match $result {
            Ok(there) => there,
            Err(why) => $crate::skip!("{why}"),
        }
    };
}

/// Ends the test as skipped if this machine's CPU lacks one of these features.
#[macro_export]
macro_rules! need_cpu {
    ($($feature:tt),+ $(,)?) => {$(
        if !std::is_x86_feature_detected!($feature) {
            $crate::skip!("this machine's CPU lacks {}", $feature);
        }
    )+};
}

/// The name of the test around this, as its harness gives it.
#[macro_export]
macro_rules! test_name {
    () => {{
        fn here() {}
        $crate::name_of(std::any::type_name_of_val(&here))
    }};
}

/// The name of the test in which a function `here` is declared.
///
/// The thread has that name too, but not if the harness has a single thread.
///
/// # Panics
/// The thread belongs to another test: the function is not the test, but called by it, and the
/// harness does not know its name.
#[doc(hidden)]
pub fn name_of(here: &'static str) -> &'static str {
    let path = here.strip_suffix("::here").unwrap_or(here);
    let path = path.split("::{{closure}}").next().unwrap_or(path);
    let name = path.split_once("::").map_or(path, |(_, name)| name);
    if let Some(thread) = thread::current().name()
        && thread != "main"
    {
        assert_eq!(thread, name, "only the test itself says that it is skipped");
    }
    name
}
