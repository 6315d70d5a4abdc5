use super::*;
#[test]
fn placeholder_builds() {
    let _ = Choice::default();
}
