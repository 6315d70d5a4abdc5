//! All pages of a list as one consistent answer (page 1.9).

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::answer::ApiError;
use super::client::Client;

/// Rows asked for at once: the server's default limit. A lower one of its own is learnt from its refusal.
pub(super) const PAGE: usize = 500;
/// How often a list is read before it is given up, or believed without its count.
const READINGS: u64 = 3;
/// Between two of them, times their number.
const PAUSE: Duration = Duration::from_millis(200);

/// Rows by identity, in the order of their first sight.
#[derive(Default)]
struct Rows {
    rows: Vec<Value>,
    places: HashMap<String, usize>,
}

impl Rows {
    /// A row that a change pushed to a later page is met twice: the later one counts.
    fn add(&mut self, row: Value) {
        let id = row.get("id").or_else(|| row.get("jobid")).and_then(Value::as_str);
        let id = id.map_or_else(|| row.to_string(), str::to_owned);
        match self.places.get(&id) {
            Some(&place) => self.rows[place] = row,
            None => {
                self.places.insert(id, self.rows.len());
                self.rows.push(row);
            }
        }
    }

    fn ids(&self) -> BTreeSet<String> {
        self.places.keys().cloned().collect()
    }
}

struct Reading {
    rows: Rows,
    /// What the server said that there are; it may differ from page to page, and be missing.
    counts: BTreeSet<usize>,
}

impl Reading {
    fn agrees(&self) -> bool {
        self.counts.iter().all(|count| *count == self.rows.rows.len())
    }
}

impl Client {
    /// Reads a whole list: `key` is the array's name in the answer. Rows are told apart by `id` (or
    /// `jobid`), and compared with `count`; where they disagree, something changed between two pages,
    /// and all of it is read again. A list that never agrees is [`ApiError::NoAnswer`], but for one
    /// whose rows stay the same: then it is the count that is wrong.
    ///
    /// Each page has the call's whole deadline.
    pub async fn list<T: DeserializeOwned>(
        &self,
        command: &str,
        params: &[(&str, &str)],
        key: &str,
    ) -> Result<Vec<T>, ApiError> {
        let mut before: Option<BTreeSet<String>> = None;
        let mut steady = true;
        for reading in 1..=READINGS {
            let now = self.reading(command, params, key).await?;
            if now.agrees() {
                return decode(command, key, now.rows);
            }
            let ids = now.rows.ids();
            steady &= before.as_ref().is_none_or(|b| *b == ids);
            if reading == READINGS && steady {
                tracing::warn!(
                    "{command} says that there are {:?} of {key}, but shows the same {} at each of {READINGS} readings",
                    now.counts,
                    ids.len()
                );
                return decode(command, key, now.rows);
            }
            before = Some(ids);
            tokio::time::sleep(PAUSE * u32::try_from(reading).unwrap_or(1)).await;
        }
        Err(ApiError::NoAnswer {
            words: format!("{command} at {}: the list changed during each of {READINGS} readings", self.endpoint()),
        })
    }

    async fn reading(&self, command: &str, params: &[(&str, &str)], key: &str) -> Result<Reading, ApiError> {
        let mut size = self.page_size();
        let mut reading = Reading { rows: Rows::default(), counts: BTreeSet::new() };
        let mut page = 1;
        loop {
            let (number, most) = (page.to_string(), size.to_string());
            let mut all = params.to_vec();
            all.extend([("page", number.as_str()), ("pagesize", most.as_str())]);
            let mut answer = match self.read(command, &all).await {
                Ok(answer) => answer,
                Err(ApiError::Api { text, .. }) if smaller(&text).is_some_and(|n| n < size) => {
                    size = smaller(&text).unwrap_or(1);
                    self.set_page_size(size);
                    reading = Reading { rows: Rows::default(), counts: BTreeSet::new() };
                    page = 1;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let count = answer.get("count").and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
            let rows = match answer.get_mut(key).map(Value::take) {
                Some(Value::Array(rows)) => rows,
                _ => Vec::new(),
            };
            let got = rows.len();
            // A page past the end has a count and no rows; no match has neither (page 1.5).
            reading.counts.extend(count);
            let before = reading.rows.rows.len();
            rows.into_iter().for_each(|row| reading.rows.add(row));
            let seen = reading.rows.rows.len();
            // A full page without anything new: a server that does not know paging.
            if got != size || count == Some(seen) || seen == before {
                return Ok(reading);
            }
            page += 1;
        }
    }
}

/// `Page size can't exceed max allowed page size value: N`.
fn smaller(text: &str) -> Option<usize> {
    let (_, number) = text.split_once("max allowed page size value:")?;
    number.trim().trim_end_matches('.').parse().ok().filter(|n| *n > 0)
}

fn decode<T: DeserializeOwned>(command: &str, key: &str, rows: Rows) -> Result<Vec<T>, ApiError> {
    let bad = |e: serde_json::Error| ApiError::NoAnswer {
        words: format!("{command} shows a {key} in a form that volfs does not know: {e}"),
    };
    rows.rows.into_iter().map(|row| serde_json::from_value(row).map_err(bad)).collect()
}
