//! JSON in the shape of `qemu-img --output=json`: four spaces, one value a line, keys in QEMU's order.
//!
//! QEMU keeps an object in a hash table of 512 buckets and prints bucket by bucket, so the order of keys is fixed by
//! the keys alone: by bucket, and inside a bucket newest first. [`Json::object`] sorts by the same hash.

use std::fmt::Write as _;

/// A JSON value.
#[derive(Clone, Debug, PartialEq)]
pub enum Json {
    /// `true` or `false`.
    Bool(bool),
    /// A whole number.
    Int(u64),
    /// A number with a fraction.
    Real(f64),
    /// Text.
    Text(String),
    /// Several values.
    List(Vec<Json>),
    /// Named values, in the order they are printed.
    Object(Vec<(String, Json)>),
}

impl Json {
    /// Text.
    pub fn text(text: impl Into<String>) -> Self {
        Self::Text(text.into())
    }

    /// An object whose keys, given in the order QEMU fills them in, are put in the order QEMU prints them.
    pub fn object<K: Into<String>>(pairs: impl IntoIterator<Item = (K, Json)>) -> Self {
        let mut pairs: Vec<_> = pairs
            .into_iter()
            .map(|(key, value)| (key.into(), value))
            .collect();
        pairs.reverse();
        pairs.sort_by_key(|(key, _)| bucket(key));
        Self::Object(pairs)
    }

    /// An object whose keys stay as they are given: for output that is ours alone.
    pub fn ordered<K: Into<String>>(pairs: impl IntoIterator<Item = (K, Json)>) -> Self {
        Self::Object(
            pairs
                .into_iter()
                .map(|(key, value)| (key.into(), value))
                .collect(),
        )
    }

    /// Over several lines, as `qemu-img` prints it, with a final newline.
    pub fn pretty(&self) -> String {
        let mut out = String::new();
        self.write(&mut out, Some(0));
        out.push('\n');
        out
    }

    /// On one line, without a newline.
    pub fn line(&self) -> String {
        let mut out = String::new();
        self.write(&mut out, None);
        out
    }

    fn write(&self, out: &mut String, depth: Option<usize>) {
        match self {
            Self::Bool(value) => out.push_str(if *value { "true" } else { "false" }),
            Self::Int(value) => write_to(out, format_args!("{value}")),
            Self::Real(value) => write_to(out, format_args!("{value}")),
            Self::Text(text) => quote(text, out),
            Self::List(values) => {
                out.push('[');
                for (index, value) in values.iter().enumerate() {
                    separate(out, index, depth);
                    value.write(out, depth.map(|depth| depth + 1));
                }
                close(out, depth, ']');
            }
            Self::Object(pairs) => {
                out.push('{');
                for (index, (key, value)) in pairs.iter().enumerate() {
                    separate(out, index, depth);
                    quote(key, out);
                    out.push_str(": ");
                    value.write(out, depth.map(|depth| depth + 1));
                }
                close(out, depth, '}');
            }
        }
    }
}

fn write_to(out: &mut String, text: std::fmt::Arguments<'_>) {
    // A String takes whatever is written to it.
    let _ = out.write_fmt(text);
}

fn separate(out: &mut String, index: usize, depth: Option<usize>) {
    match depth {
        Some(depth) => {
            if index > 0 {
                out.push(',');
            }
            indent(out, depth + 1);
        }
        None if index > 0 => out.push_str(", "),
        None => {}
    }
}

fn close(out: &mut String, depth: Option<usize>, bracket: char) {
    if let Some(depth) = depth {
        indent(out, depth);
    }
    out.push(bracket);
}

fn indent(out: &mut String, depth: usize) {
    out.push('\n');
    for _ in 0..depth {
        out.push_str("    ");
    }
}

/// Adds `text` as a JSON string. All that is not printable ASCII is escaped, as QEMU does.
pub fn quote(text: &str, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            ' '..='~' => out.push(c),
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    write_to(out, format_args!("\\u{unit:04X}"));
                }
            }
        }
    }
    out.push('"');
}

/// The bucket of QEMU's hash table that `key` falls into.
fn bucket(key: &str) -> u32 {
    let bytes = key.as_bytes();
    let mut value = 0x238F_13AF_u32.wrapping_mul(bytes.len() as u32);
    for (index, byte) in bytes.iter().enumerate() {
        value = value.wrapping_add(u32::from(*byte) << (index * 5 % 24));
    }
    value.wrapping_mul(1_103_515_243).wrapping_add(12_345) % 512
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The orders were read off `qemu-img 10.0.2`.
    #[test]
    fn keys_come_in_the_order_qemu_prints() {
        for order in [
            &[
                "children",
                "backing-filename-format",
                "snapshots",
                "virtual-size",
                "filename",
                "cluster-size",
                "format",
                "actual-size",
                "format-specific",
                "full-backing-filename",
                "backing-filename",
                "dirty-flag",
            ][..],
            &[
                "icount",
                "vm-clock-nsec",
                "name",
                "date-sec",
                "date-nsec",
                "vm-clock-sec",
                "id",
                "vm-state-size",
            ],
            &[
                "compat",
                "compression-type",
                "lazy-refcounts",
                "refcount-bits",
                "corrupt",
                "extended-l2",
            ],
            &["bitmaps", "required", "fully-allocated"],
            &[
                "image-end-offset",
                "total-clusters",
                "check-errors",
                "allocated-clusters",
                "filename",
                "format",
            ],
        ] {
            let mut names = order.to_vec();
            names.sort_unstable();
            let Json::Object(pairs) = Json::object(names.into_iter().map(|name| (name, Json::Bool(true))))
            else {
                panic!("not an object");
            };
            let sorted: Vec<_> = pairs.iter().map(|(key, _)| key.as_str()).collect();
            assert_eq!(sorted, order);
        }
    }

    #[test]
    fn empty_lists_take_two_lines() {
        let json = Json::ordered([
            ("a", Json::List(Vec::new())),
            ("b", Json::ordered([("c", Json::Int(1))])),
        ]);
        assert_eq!(
            json.pretty(),
            "{\n    \"a\": [\n    ],\n    \"b\": {\n        \"c\": 1\n    }\n}\n"
        );
        assert_eq!(json.line(), r#"{"a": [], "b": {"c": 1}}"#);
    }

    #[test]
    fn control_characters_and_other_scripts_are_escaped() {
        let mut out = String::new();
        quote("a\"\\\n\u{1}é\u{1F600}\u{7f}", &mut out);
        assert_eq!(out, r#""a\"\\\n\u0001\u00E9\uD83D\uDE00\u007F""#);
    }
}
