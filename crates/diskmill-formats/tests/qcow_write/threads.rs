//! Many threads on one image.

use super::images;

#[test]
fn threads_that_share_clusters_do_not_lose_writes() {
    for name in ["plain", "overlay", "largest", "secret over longer"] {
        let image = images::named(name).make();
        let (bytes, expected) = image.stage().share(4, 3000);
        image.assert_good(&bytes, &expected);
    }
}
