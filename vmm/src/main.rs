//! The program `umbra`.
fn main() {}
