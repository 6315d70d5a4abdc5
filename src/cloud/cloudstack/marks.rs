//! The owner's mark as tags. A key is unique per resource and deleting takes key and value, so the
//! two calls are a compare-and-set; the mark is read back after each (reference: page 2.17).

use tokio::time::Instant;

use super::super::{Call, CloudError, Label, Refusal};
use super::provider::{CloudStack, LOOK_AGAIN, no_such};
use super::rows::{TAG, TAG_DISK, TAG_JOB, TAG_MADE_BY, TAG_RECORD, TAGS, VolumeRow};
use crate::failpoint;
use crate::model::{Mark, VolumeId};

pub(super) fn another(volume: VolumeId, found: Option<Mark>) -> CloudError {
    let whose = found.map_or_else(|| "no mark".to_owned(), |mark| format!("the mark {mark}"));
    CloudError::Refused { why: Refusal::Mark(found), words: format!("volume {volume} carries {whose}") }
}

/// The tags that a label makes; `made_by` stays with a volume until its first owner changes.
fn tags_of(label: &Label, made_by: Option<String>) -> Vec<(&'static str, String)> {
    let mut tags = vec![
        (TAG, label.mark.to_string()),
        (TAG_RECORD, label.mark.record.to_string()),
        (TAG_JOB, label.job.to_string()),
        (TAG_DISK, label.disk.to_string()),
    ];
    tags.extend(made_by.map(|fence| (TAG_MADE_BY, fence)));
    tags
}

impl CloudStack {
    /// Replaces the mark if it is `expect`, with the names beside it.
    pub(super) async fn exchange(
        &self,
        call: &Call,
        volume: VolumeId,
        expect: Option<Mark>,
        new: Option<&Label>,
    ) -> Result<(), CloudError> {
        let row = self.row(volume).await?.ok_or_else(|| no_such(volume))?;
        let wanted = new.map(|label| label.mark);
        if row.mark() != expect && row.mark() != wanted {
            return Err(another(volume, row.mark()));
        }
        // A volume that this very operation made carries its fence, by name, until then.
        let made_by = match row.mark() {
            None => Some(call.fence().to_string()).filter(|fence| row.name == format!("volfs-{fence}")),
            Some(mark) if Some(mark) == wanted => row.tag(TAG_MADE_BY).map(str::to_owned),
            Some(_) => None,
        };
        let tags = new.map(|label| tags_of(label, made_by)).unwrap_or_default();
        let stays = |key: &str, value: &str| tags.iter().any(|(k, v)| *k == key && v == value);
        let old: Vec<(&str, String)> = TAGS
            .into_iter()
            .filter_map(|key| Some((key, row.tag(key)?.to_owned())))
            .filter(|(key, value)| !stays(key, value))
            .collect();
        let fresh: Vec<(&str, String)> =
            tags.iter().filter(|(key, value)| row.tag(key) != Some(value)).cloned().collect();
        if !old.is_empty() {
            self.tag(call, volume, "deleteTags", &old, wanted).await?;
            let off = |row: &VolumeRow| row.mark() == wanted || row.mark() != expect;
            let now = self.row_when(volume, off).await?.ok_or_else(|| no_such(volume))?.mark();
            if now.is_some() && now != wanted {
                return Err(another(volume, now));
            }
            failpoint::reach("cloudstack.unmarked").await;
        }
        if !fresh.is_empty()
            && let Err(error) = self.tag(call, volume, "createTags", &fresh, wanted).await
        {
            return Err(match error {
                // Somebody else's is there now.
                CloudError::Refused { why: Refusal::Mark(_), .. } => error,
                _ if old.iter().any(|(key, _)| *key == TAG) => self.put_back(call, volume, &old, error).await,
                _ => error,
            });
        }
        // None at all, or still the one before: a copy that lags may say so for a while.
        let told = |row: &VolumeRow| row.mark() == wanted || (row.mark().is_some() && row.mark() != expect);
        let now = self.row_when(volume, told).await?.ok_or_else(|| no_such(volume))?.mark();
        if now == wanted { Ok(()) } else { Err(another(volume, now)) }
    }

    /// The new mark was refused when the old one was off already: without one the volume would be
    /// nobody's. Answers the refusal.
    async fn put_back(&self, call: &Call, volume: VolumeId, old: &[(&str, String)], refused: CloudError) -> CloudError {
        let began = Instant::now();
        loop {
            match self.tag(call, volume, "createTags", old, None).await {
                Ok(()) => return refused,
                Err(CloudError::Refused { why: Refusal::Passing, .. }) if began.elapsed() < self.options.late => {
                    tokio::time::sleep(LOOK_AGAIN.min(self.options.late)).await;
                }
                Err(error) => {
                    tracing::error!(%volume, "its old mark is off, and cannot be put back: {error}");
                    return refused;
                }
            }
        }
    }

    /// Sets or deletes tags of a volume that is to carry `mark` then. That somebody else's is there
    /// already is said by the mark that is found, not by the error.
    async fn tag(
        &self,
        call: &Call,
        volume: VolumeId,
        command: &'static str,
        tags: &[(&str, String)],
        mark: Option<Mark>,
    ) -> Result<(), CloudError> {
        let id = volume.to_string();
        let names: Vec<(String, String)> =
            (0..tags.len()).map(|n| (format!("tags[{n}].key"), format!("tags[{n}].value"))).collect();
        let mut params = vec![("resourceids", id.as_str()), ("resourcetype", "Volume")];
        for ((key, value), (tag, text)) in names.iter().zip(tags) {
            params.extend([(key.as_str(), *tag), (value.as_str(), text.as_str())]);
        }
        let wanted = command == "createTags";
        let done = |row: Option<&VolumeRow>| {
            row.is_some_and(|row| tags.iter().all(|(key, value)| (row.tag(key) == Some(value)) == wanted))
        };
        let before = self.carry_out(call, volume, command, &params, done).await;
        match before {
            Err(CloudError::Refused { why: Refusal::Other, words }) => {
                let found = self.row(volume).await?.ok_or_else(|| no_such(volume))?.mark();
                match found {
                    Some(_) if wanted && found != mark => Err(another(volume, found)),
                    _ => Err(CloudError::Refused { why: Refusal::Other, words }),
                }
            }
            other => other,
        }
    }
}
