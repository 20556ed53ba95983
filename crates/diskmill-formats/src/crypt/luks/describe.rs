//! What `info` shows of a LUKS header.

use diskmill_core::{Format, Value};

use super::layout::STRIPES;
use super::{Header, Place, Slot};

/// What `header` says, in the order in which qemu-img shows it.
pub(super) fn describe(header: &Header, place: Place) -> Vec<(&'static str, Value)> {
    let text = |text: &str| Value::Text(text.to_owned());
    let cipher = header.cipher();
    let mut map = vec![
        ("ivgen-alg", text(cipher.ivgen().name())),
        ("detached-header", Value::Bool(place == Place::Detached)),
        ("hash-alg", text(header.hash().name())),
        ("cipher-alg", text(cipher.alg().name())),
        ("uuid", Value::Text(header.uuid())),
    ];
    if let Some(hash) = cipher.ivgen_hash() {
        map.push(("ivgen-hash-alg", text(hash.name())));
    }
    // Only inside another format it has to be said which it is.
    if matches!(place, Place::Embedded { .. }) {
        map.push(("format", text(Format::Luks.name())));
    }
    map.push(("cipher-mode", text(cipher.mode().name())));
    let slots = header.slots().iter().map(describe_slot).collect();
    map.push(("slots", Value::List(slots)));
    map.push(("payload-offset", Value::Int(header.payload_offset())));
    map.push(("master-key-iters", Value::Int(header.iterations.into())));
    map
}

fn describe_slot(slot: &Slot) -> Value {
    let mut map = vec![("active", Value::Bool(slot.active))];
    if slot.active {
        map.push(("iters", Value::Int(slot.iterations.into())));
    }
    map.push(("key-offset", Value::Int(slot.key_offset())));
    if slot.active {
        map.push(("stripes", Value::Int(STRIPES.into())));
    }
    Value::Map(map)
}
