//! Images kept in the repository read the same today as on the day they were made.

use diskmill_testkit::{Scratch, golden, hash, oracle};

use crate::agree::assert_agree;
use crate::tools::ours;

#[test]
fn golden__images_read_as_recorded() {
    for image in golden::all() {
        let scratch = Scratch::new();
        image.unpack(&scratch);
        let name = &image.name;
        ours(&scratch)
            .words(&format!("convert -f qcow2 -O raw {name} out.raw"))
            .ok();
        assert_eq!(image.sha256, hash::sha256_file(scratch.join("out.raw")), "{name}");
        ours(&scratch)
            .words(&format!("check -f qcow2 {name}"))
            .finish()
            .expect(image.check);
        assert_agree(&scratch, name, "qcow2");
    }
}

/// What an image holds that we do not know survives our changing it; bits that demand it are cleared.
#[test]
fn golden__unknown_parts_survive_a_change() {
    let scratch = Scratch::new();
    let image = golden::all()
        .into_iter()
        .find(|image| image.name == "unknown.qcow2")
        .expect("the image");
    image.unpack(&scratch);
    let header = |len: usize| diskmill_testkit::scratch::peek(scratch.join("unknown.qcow2"), 0, len);
    let before = header(1024);
    ours(&scratch).words("resize -f qcow2 unknown.qcow2 +1M").ok();
    let after = header(1024);
    assert_eq!(before[80..88], after[80..88], "compatible bits");
    assert_eq!(
        after[88..96],
        [0; 8],
        "unknown autoclear bits are cleared on writing"
    );
    assert_eq!(before[112..136], after[112..136], "the tail of the header");
    let extension = &before[136..152];
    assert!(
        after.windows(extension.len()).any(|window| window == extension),
        "the unknown extension"
    );
    oracle::assert_clean(scratch.join("unknown.qcow2"), "qcow2");
}
