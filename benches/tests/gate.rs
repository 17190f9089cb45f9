//! The figures that repeat exactly are not worse than those in `gate.json`.
//!
//! They are the same on each host, so they are compared on one.

use std::process::ExitCode;

use umbra_benches::gate::Gate;
use umbra_benches::suite::exact::measure;
use umbra_skip::{skip, skip_part};
use umbra_tests::suite::{Need, Suite};

fn exact_figures_have_not_got_worse() {
    let compared = Gate::read().unwrap().compare(&measure(|_| {}).unwrap());
    compared.better.iter().for_each(|said| println!("{said}"));
    assert!(
        compared.worse.is_empty(),
        "{}\nif that is meant, `cargo xtask bench gate --update` holds the new figures",
        compared.worse.join("\n")
    );
    if compared.compared == 0 {
        let why = compared.skipped.iter().map(|(figures, why)| format!("{figures}: {why}"));
        skip!("nothing was compared; {}", why.collect::<Vec<_>>().join("; "));
    }
    for (figures, why) in compared.skipped {
        skip_part!(figures, "{why}");
    }
}

fn main() -> ExitCode {
    let mut suite = Suite::default();
    suite.add(
        "exact_figures_have_not_got_worse",
        &Need::machine(),
        exact_figures_have_not_got_worse,
    );
    suite.run()
}
