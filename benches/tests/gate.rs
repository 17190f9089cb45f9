//! The figures that repeat exactly are not worse than those in `gate.json`.

use umbra_benches::gate::{Gate, measure};

#[test]
fn exact_figures_have_not_got_worse() {
    let gate = Gate::read().unwrap();
    let mut measured = measure(|_| {}).unwrap();
    if let Some(why) = measured.skipped.clone().or_else(|| gate.foreign(&measured)) {
        println!("SKIPPED: exact_figures_have_not_got_worse: those of guests: {why}");
        measured.figures.retain(|figure| figure.group.starts_with("replay of the slice"));
        measured.skipped = Some(why);
    }
    let compared = gate.compare(&measured);
    compared.better.iter().for_each(|said| println!("{said}"));
    assert!(
        compared.worse.is_empty(),
        "{}\nif that is meant, `cargo xtask bench gate --update` holds the new figures",
        compared.worse.join("\n")
    );
}
