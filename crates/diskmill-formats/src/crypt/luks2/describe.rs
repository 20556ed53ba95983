//! What `info` shows of a LUKS2 header.

use diskmill_core::Value;

use super::Volume2;
use super::metadata::{Kdf, Keyslot};

/// What the header says, in the words that LUKS1 has for it where there are such.
pub(super) fn describe(volume: &Volume2) -> Vec<(&'static str, Value)> {
    let text = |text: &str| Value::Text(text.to_owned());
    let segment = &volume.metadata.segment;
    let spec = segment.spec;
    let mut map = vec![
        ("version", Value::Int(2)),
        ("ivgen-alg", text(spec.ivgen().name())),
        ("cipher-alg", text(spec.alg().name())),
        ("cipher-mode", text(spec.mode().name())),
    ];
    if let Some(hash) = spec.ivgen_hash() {
        map.push(("ivgen-hash-alg", text(hash.name())));
    }
    map.push(("sector-size", Value::Int(segment.sector_len as u64)));
    map.push(("uuid", text(&volume.uuid)));
    for (name, value) in [("label", &volume.label), ("subsystem", &volume.subsystem)] {
        if !value.is_empty() {
            map.push((name, text(value)));
        }
    }
    map.push(("sequence", Value::Int(volume.sequence)));
    let slots = volume.metadata.slots.iter();
    let slots = slots.map(|(number, slot)| describe_slot(*number, slot)).collect();
    map.push(("slots", Value::List(slots)));
    map.push(("payload-offset", Value::Int(segment.offset)));
    map
}

fn describe_slot(number: u32, slot: &Keyslot) -> Value {
    let text = |text: &str| Value::Text(text.to_owned());
    let mut map = vec![("slot", Value::Int(number.into()))];
    match slot.kdf {
        Kdf::Pbkdf2 { hash, iterations } => {
            map.push(("kdf", text("pbkdf2")));
            map.push(("hash-alg", text(hash.name())));
            map.push(("iters", Value::Int(iterations)));
        }
        Kdf::Argon2 {
            id,
            time,
            memory,
            lanes,
        } => {
            map.push(("kdf", text(if id { "argon2id" } else { "argon2i" })));
            map.push(("time", Value::Int(time)));
            map.push(("memory", Value::Int(memory.saturating_mul(1024))));
            map.push(("cpus", Value::Int(lanes)));
        }
    }
    map.push(("key-offset", Value::Int(slot.offset)));
    Value::Map(map)
}
