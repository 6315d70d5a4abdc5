use super::super::disk::{json, parse};
use super::*;
use crate::fuzz::fuzz;

#[test]
fn any_meta_json_is_read_as_it_is_written_or_named_as_damaged() {
    let id = VolumeId::parse("3c9a6f0e-5b7d-4e1a-8f22-0a1b2c3d4e5f").unwrap();
    let path = Path::new("meta.json");
    fuzz("meta", 20_000, |bytes| match parse(path, bytes, id) {
        Ok(meta) => {
            assert_eq!(meta.id, id);
            let written = json(&meta, path).unwrap();
            let again = parse(path, &written, id).unwrap();
            // A later version's fraction may change in its last digit.
            let fraction = again.rest != meta.rest && meta.rest.values().any(|v| v.to_string().contains(['.', 'e']));
            assert!(again == meta || fraction, "{}", String::from_utf8_lossy(&written));
            true
        }
        Err(e) => {
            assert!(matches!(&e, CloudError::Ambiguous { words } if words.starts_with("meta.json: ")), "{e:?}");
            false
        }
    });
}
