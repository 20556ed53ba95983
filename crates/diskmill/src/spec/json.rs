//! JSON as QEMU reads it: strings may stand between single quotes, which spares quoting for the shell.

use serde_json::Value;

use super::SpecError;

/// The value that `text` stands for.
pub fn parse_json(text: &str) -> Result<Value, SpecError> {
    let parsed = if text.contains('\'') {
        serde_json::from_str(&with_double_quotes(text))
    } else {
        serde_json::from_str(text)
    };
    parsed.map_err(|error| SpecError::Json(error.to_string()))
}

/// `text` with each string between double quotes.
fn with_double_quotes(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 16);
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (c, quote) {
            ('\'' | '"', None) => {
                quote = Some(c);
                out.push('"');
            }
            (c, Some(end)) if c == end => {
                quote = None;
                out.push('"');
            }
            ('"', Some(_)) => out.push_str("\\\""),
            ('\\', Some(_)) => match chars.next() {
                Some('\'') => out.push('\''),
                Some(escaped) => out.extend(['\\', escaped]),
                None => out.push('\\'),
            },
            (c, _) => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_have_single_or_double_quotes() {
        let read = |text: &str| parse_json(text).unwrap();
        assert_eq!(read("{'a': 'b'}"), read(r#"{"a": "b"}"#));
        assert_eq!(read(r#"{"it's": 'a "b"'}"#), read(r#"{"it's": "a \"b\""}"#));
        assert_eq!(read(r"['\'', '\\', '\u0041']"), read(r#"["'", "\\", "A"]"#));
        for text in ["{'a\": 1}", "'", "'a\\", "{'a': b}"] {
            assert!(matches!(parse_json(text), Err(SpecError::Json(_))), "{text}");
        }
    }
}
