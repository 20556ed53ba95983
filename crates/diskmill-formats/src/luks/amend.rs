//! Changing which passphrases open an image.

use diskmill_core::{Amendment, Error, Format, Job, OptionKind, OptionSpec, Result, SecretError};

use super::KEY_SECRET;
use super::write::Image;
use crate::crypt::luks::{Place, SlotChange, change_slots};

/// The options of an image that exists, sorted by name.
pub(super) static OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "iter-time",
        kind: OptionKind::Number,
        default: None,
        help: "Milliseconds that trying the new passphrase is to take",
    },
    OptionSpec {
        name: "keyslot",
        kind: OptionKind::Number,
        default: None,
        help: "The key slot that is meant, 0 to 7",
    },
    OptionSpec {
        name: "new-secret",
        kind: OptionKind::Text,
        default: None,
        help: "The secret that holds the new passphrase",
    },
    OptionSpec {
        name: "old-secret",
        kind: OptionKind::Text,
        default: None,
        help: "The secret that holds the passphrase to erase, in whichever slots",
    },
    OptionSpec {
        name: "state",
        kind: OptionKind::Text,
        default: None,
        help: "active to add a passphrase, inactive to erase one",
    },
];

/// See [`LayerMut::amend`](diskmill_core::LayerMut::amend).
pub(super) fn run(image: &Image, wish: &Amendment, job: Job<'_>) -> Result<()> {
    wish.options.only(OPTIONS)?;
    let change = SlotChange::parse(&wish.options, "")?;
    let Some(key) = &image.key else {
        return Err(Error::from(SecretError::Missing(KEY_SECRET)).format(Format::Luks));
    };
    let (place, file) = match &image.detached {
        Some(header) => (Place::Detached, header),
        None => (Place::Standalone, &image.file),
    };
    let _flight = image.hold_all();
    change_slots(
        file.as_ref(),
        place,
        &change,
        key,
        &image.secrets,
        wish.force,
        job,
    )
}
