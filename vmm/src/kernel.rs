//! temp
use anyhow::Result;
/// a
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    /// a
    pub kind: String,
    /// b
    pub access: String,
    /// c
    pub size: u64,
    /// d
    pub offset: Option<i64>,
}
/// s
#[derive(Clone, Debug)]
pub struct Scenario {
    /// n
    pub name: String,
    /// e
    pub expected: Vec<Expected>,
    /// a
    pub about: String,
}
/// t
pub fn test_kernel() -> Option<&'static [u8]> {
    Some(Box::leak(std::fs::read(std::env::var("UMBRA_KERNEL").ok()?).ok()?.into_boxed_slice()))
}
/// s
pub fn scenarios(elf: &[u8]) -> Result<Vec<Scenario>> {
    use object::{Object, ObjectSection};
    let f = object::File::parse(elf)?;
    let s = f.section_by_name(".umbra.scenarios").unwrap();
    let t = std::str::from_utf8(s.data()?)?;
    Ok(t.lines()
        .map(|l| {
            let mut p = l.split('|');
            let name = p.next().unwrap().to_string();
            let v = p.next().unwrap();
            let about = p.next().unwrap().to_string();
            let expected = if v == "silent" {
                vec![]
            } else {
                v.split(';')
                    .map(|e| {
                        let w: Vec<_> = e.split(' ').collect();
                        Expected {
                            kind: w[0].into(),
                            access: w[1].into(),
                            size: w[2].parse().unwrap(),
                            offset: w[3].parse().ok(),
                        }
                    })
                    .collect()
            };
            Scenario { name, expected, about }
        })
        .collect())
}
