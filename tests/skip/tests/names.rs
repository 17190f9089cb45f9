//! The name of a test is the harness's, and only a test has one.

use std::thread::Builder;

use umbra_skip::{line, need, need_cpu, said, test_name};

#[test]
fn a_test_knows_its_name() {
    const NAME: &str = "a_test_knows_its_name";
    assert_eq!(test_name!(), NAME);
    let in_a_closure = || test_name!();
    assert_eq!(in_a_closure(), NAME);
    let in_a_thread = std::thread::spawn(|| test_name!());
    assert_eq!(in_a_thread.join().unwrap(), NAME);
}

mod inner {
    #[test]
    fn a_name_has_its_modules() {
        assert_eq!(umbra_skip::test_name!(), "inner::a_name_has_its_modules");
    }
}

#[test]
fn a_function_of_several_tests_has_no_name() {
    fn helper() -> &'static str {
        test_name!()
    }
    let called_by =
        |thread: &str| Builder::new().name(thread.into()).spawn(helper).unwrap().join().is_ok();
    assert!(!called_by("a_function_of_several_tests_has_no_name"));
    // The only thread of a harness.
    assert!(called_by("main"));
}

#[test]
fn what_is_there_is_handed_out() {
    need_cpu!("sse", "sse2");
    assert_eq!(need!(Ok::<_, &str>(3)), 3);
}

#[test]
fn a_line_says_what_and_why() {
    let text = line("a::b", "the host\nlacks it");
    assert_eq!(said(&text), Some("a::b: the host lacks it"));
    assert_eq!(said(&format!("test c ... {text}")), Some("a::b: the host lacks it"));
    assert_eq!(said("it was skipped"), None);
}
