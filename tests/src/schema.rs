//! Checks JSON against a JSON Schema, as far as the schemas in `docs/` make use of it.
//!
//! It is stricter than the standard (and than the crate `jsonschema`, which would bring some 50
//! others): a property that the schema does not name is an error here, so that no field stays
//! undocumented. A keyword that this does not know is an error, too.

use regex::Regex;
use serde_json::Value;

/// Checks `value` against `schema`.
///
/// # Errors
/// The place in `value` that does not fit, and why.
pub fn check(schema: &Value, value: &Value) -> Result<(), String> {
    Checker { root: schema }.check(schema, value, "$")
}

struct Checker<'a> {
    root: &'a Value,
}

impl Checker<'_> {
    fn check(&self, schema: &Value, value: &Value, at: &str) -> Result<(), String> {
        let keywords = schema.as_object().ok_or("a schema that is no object")?;
        for (keyword, argument) in keywords {
            let holds = match keyword.as_str() {
                "$schema" | "$defs" | "title" | "description" => true,
                "const" => value == argument,
                "enum" => list(argument).contains(value),
                "type" => is_of_type(value, argument),
                "minimum" => !value.is_number() || value.as_f64() >= argument.as_f64(),
                "maxItems" => value.as_array().map(|items| items.len() as u64) <= argument.as_u64(),
                "pattern" => self.matches(value, argument)?,
                "required" => list(argument)
                    .iter()
                    .all(|name| name.as_str().is_some_and(|name| value.get(name).is_some())),
                "anyOf" => {
                    list(argument).iter().any(|schema| self.check(schema, value, at).is_ok())
                }
                "$ref" => {
                    self.check(self.definition(argument)?, value, at)?;
                    true
                }
                "properties" => {
                    self.properties(argument, value, at)?;
                    true
                }
                "items" => {
                    for (i, item) in list(value).iter().enumerate() {
                        self.check(argument, item, &format!("{at}[{i}]"))?;
                    }
                    true
                }
                other => return Err(format!("the schema has a keyword {other}")),
            };
            if !holds {
                return Err(format!("{at} is {value}: {keyword} is {argument}"));
            }
        }
        Ok(())
    }

    fn properties(&self, schemas: &Value, value: &Value, at: &str) -> Result<(), String> {
        for (name, value) in value.as_object().into_iter().flatten() {
            let schema = schemas.get(name).ok_or(format!("{at}.{name} is not documented"))?;
            self.check(schema, value, &format!("{at}.{name}"))?;
        }
        Ok(())
    }

    fn definition(&self, reference: &Value) -> Result<&Value, String> {
        let pointer = reference.as_str().and_then(|text| text.strip_prefix('#'));
        let found = pointer.and_then(|pointer| self.root.pointer(pointer));
        found.ok_or(format!("the schema has nothing at {reference}"))
    }

    fn matches(&self, value: &Value, pattern: &Value) -> Result<bool, String> {
        let Some(text) = value.as_str() else { return Ok(true) };
        let pattern = Regex::new(pattern.as_str().unwrap_or_default());
        Ok(pattern.map_err(|error| error.to_string())?.is_match(text))
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn is_of_type(value: &Value, names: &Value) -> bool {
    let is = |name: &Value| match name.as_str() {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("boolean") => value.is_boolean(),
        Some("integer") => value.is_i64() || value.is_u64(),
        Some("null") => value.is_null(),
        _ => false,
    };
    if names.is_array() { list(names).iter().any(is) } else { is(names) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_does_not_fit_is_refused() {
        let schema = json!({
            "type": "object",
            "required": ["a"],
            "properties": {
                "a": { "$ref": "#/$defs/few" },
                "b": { "anyOf": [{ "const": 1 }, { "type": ["null", "boolean"] }] },
                "c": { "enum": ["x", "y"] },
                "d": { "type": "integer", "minimum": 2 },
            },
            "$defs": {
                "few": { "type": "array", "maxItems": 2, "items": { "pattern": "^[ab]+$" } },
            },
        });
        for good in [
            json!({ "a": [] }),
            json!({ "a": ["ab", "b"], "b": 1, "c": "y", "d": 2 }),
            json!({ "a": [], "b": null }),
        ] {
            assert_eq!(check(&schema, &good), Ok(()), "{good}");
        }
        for bad in [
            json!([]),
            json!({}),
            json!({ "a": null }),
            json!({ "a": ["a", "a", "a"] }),
            json!({ "a": ["c"] }),
            json!({ "a": [], "b": 2 }),
            json!({ "a": [], "c": "z" }),
            json!({ "a": [], "d": 1 }),
            json!({ "a": [], "d": 2.5 }),
            json!({ "a": [], "e": 1 }),
        ] {
            assert!(check(&schema, &bad).is_err(), "{bad}");
        }
        assert!(check(&json!({ "unknown": 1 }), &json!(1)).is_err());
        assert!(check(&json!({ "$ref": "#/nowhere" }), &json!(1)).is_err());
    }
}
