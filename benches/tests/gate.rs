//! The figures that repeat exactly are not worse than those in `gate.json`.

use umbra_benches::gate::{Gate, measure};

#[test]
fn exact_figures_have_not_got_worse() {
    let compared = Gate::read().unwrap().compare(&measure(|_| {}).unwrap());
    if let Some(why) = &compared.skipped {
        println!("SKIPPED: exact_figures_have_not_got_worse: those of guests: {why}");
    }
    compared.better.iter().for_each(|said| println!("{said}"));
    assert!(
        compared.worse.is_empty(),
        "{}\nif that is meant, `cargo xtask bench gate --update` holds the new figures",
        compared.worse.join("\n")
    );
}
