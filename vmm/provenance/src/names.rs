//! Names of tasks and caches: bounded in number, and safe to print.

use std::collections::{HashMap, VecDeque};

use umbra_shadow::abi::NAME_MAX;

/// A guest's name as printable ASCII, at most 64 characters. Everything else becomes `?`, an empty
/// name too.
pub fn sanitize(name: &[u8]) -> String {
    let printable =
        |byte: &u8| if byte.is_ascii_graphic() || *byte == b' ' { char::from(*byte) } else { '?' };
    let name: String = name.iter().take(NAME_MAX as usize).map(printable).collect();
    if name.trim().is_empty() { "?".to_owned() } else { name }
}

/// Task names by task id; the oldest are dropped first.
#[derive(Debug)]
pub struct TaskNames {
    names: HashMap<u32, String>,
    order: VecDeque<u32>,
    max: usize,
}

impl TaskNames {
    pub fn new(max: usize) -> Self {
        Self { names: HashMap::new(), order: VecDeque::new(), max: max.max(1) }
    }

    pub fn set(&mut self, task: u32, name: &[u8]) {
        if self.names.insert(task, sanitize(name)).is_some() {
            return;
        }
        self.order.push_back(task);
        if self.order.len() > self.max
            && let Some(oldest) = self.order.pop_front()
        {
            self.names.remove(&oldest);
        }
    }

    pub fn get(&self, task: u32) -> Option<&str> {
        self.names.get(&task).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_harmless() {
        assert_eq!(sanitize(b"kmalloc-64"), "kmalloc-64");
        assert_eq!(sanitize(b"a\x1b[31m\n\xff\0b"), "a?[31m???b");
        assert_eq!(sanitize(&[b'x'; 1000]).len(), 64);
        assert_eq!(sanitize(b""), "?");
        assert_eq!(sanitize(b"  "), "?");
    }

    #[test]
    fn the_oldest_names_go() {
        let mut names = TaskNames::new(3);
        for task in 0..4 {
            names.set(task, format!("task {task}").as_bytes());
            names.set(task, format!("renamed {task}").as_bytes());
        }
        assert_eq!(names.get(0), None);
        assert_eq!(names.get(1), Some("renamed 1"));
        assert_eq!((names.names.len(), names.order.len()), (3, 3));
    }
}
