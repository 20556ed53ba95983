use super::*;

#[test]
fn relative_names_start_at_the_image_that_writes_them() {
    let resolve = |from: &str, name: &str| resolve_name(Path::new(from), OsStr::new(name));
    assert_eq!(resolve("o.q", "b.q"), Path::new("b.q"));
    assert_eq!(resolve("sub/o.q", "../b.q").as_os_str(), "sub/../b.q");
    assert_eq!(resolve("/a//o.q", "b.q").as_os_str(), "/a//b.q");
    assert_eq!(resolve("sub/o.q", "/b.q"), Path::new("/b.q"));
    assert_eq!(resolve("sub/o.q", "file:b.q").as_os_str(), "file:b.q");
}
