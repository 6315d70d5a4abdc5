//! Answers of a cloud that has lost its mind: no panic, and no words that fill `error`.

use serde_json::Value;

use super::answer::{Reply, read, success};
use super::rows::{OfferingRow, SnapshotRow, VmRow, VolumeRow, ZoneRow};
use crate::fuzz::fuzz;
use crate::model::{VmId, VolumeId};

/// Whether it is free of fractions, which may change in the last digit.
fn whole_numbers(value: &Value) -> bool {
    match value {
        Value::Number(n) => !n.is_f64(),
        Value::Array(all) => all.iter().all(whole_numbers),
        Value::Object(all) => all.values().all(whole_numbers),
        _ => true,
    }
}

#[test]
fn any_body_is_an_answer_or_one_line_of_words() {
    fuzz("answer", 20_000, |bytes| {
        let mut taken = false;
        for status in [200, 302, 401, 429, 431, 503, 530] {
            let reply = Reply { status, body: bytes.to_vec(), ..Reply::default() };
            match read(reply) {
                Ok(value) => {
                    let _ = success(&value);
                    // What was read is what is written: no whole number loses a digit.
                    let again: Value = serde_json::from_str(&value.to_string()).unwrap();
                    assert!(again == value || !whole_numbers(&value), "{value} {again}");
                    taken = true;
                }
                Err(failure) => {
                    let words = failure.error.to_string();
                    assert!(words.len() < 2000 && !words.contains(['\n', '\r', '\0']), "{words:?}");
                }
            }
        }
        taken
    });
}

#[test]
fn any_row_is_read_or_refused_and_never_claimed_by_mistake() {
    fuzz("row", 20_000, |bytes| {
        let Ok(value) = serde_json::from_slice::<Value>(bytes) else { return false };
        let _ = serde_json::from_value::<VmRow>(value.clone());
        let _ = serde_json::from_value::<ZoneRow>(value.clone());
        let _ = serde_json::from_value::<OfferingRow>(value.clone());
        if let Ok(row) = serde_json::from_value::<SnapshotRow>(value.clone()) {
            let _ = (row.shown(), row.lives());
        }
        let Ok(row) = serde_json::from_value::<VolumeRow>(value) else { return false };
        let shown = row.shown(VmId::random(), &[]);
        assert_eq!(shown.id, VolumeId(row.id));
        // A mark that is there is never taken for none: such a volume would look free.
        assert_eq!(shown.mark.is_some(), row.tags.iter().any(|t| t.key == "volfs"));
        if let Some(mark) = shown.mark.filter(|m| !m.record.0.is_nil()) {
            assert_eq!(crate::model::Mark::parse(&mark.to_string()), Some(mark));
        }
        true
    });
}
