//! What the jobs of createTags and deleteTags do.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::answer::Failure;
use crate::commands::may;
use crate::fault::Moment;
use crate::options::Account;
use crate::run::{Run, Stop};
use crate::state::{Effect, World};

/// Tags of some resources; a value as each command has it.
#[derive(Debug, Clone)]
pub(crate) struct Tagging<V> {
    pub caller: Account,
    pub kind: String,
    pub resources: Vec<String>,
    pub tags: Vec<(String, V)>,
}

impl<V> Tagging<V> {
    /// The tags of a resource that is there and that the caller may touch.
    fn of<'w>(&self, world: &'w mut World, id: &str) -> Result<&'w mut BTreeMap<String, String>, Failure> {
        let none = || Failure::parameter(format!("Unable to find resource by id {id} and type {}", self.kind));
        let denied = || Failure::internal(format!("Account '{}' doesn't have permissions for {id}", self.caller.name));
        match self.kind.to_lowercase().as_str() {
            "volume" => {
                let volume = world.volumes.get_mut(id).filter(|v| v.exists()).ok_or_else(none)?;
                if may(&self.caller, volume) { Ok(&mut volume.tags) } else { Err(denied()) }
            }
            "snapshot" => {
                let snapshot = world.snapshots.get_mut(id).filter(|s| s.state != "Destroyed").ok_or_else(none)?;
                if may(&self.caller, snapshot) { Ok(&mut snapshot.tags) } else { Err(denied()) }
            }
            _ => Err(Failure::parameter(format!("Invalid resource type: {}", self.kind))),
        }
    }

    fn ends(run: &Run) -> Result<Value, Stop> {
        run.at(Moment::Done)?;
        run.at(Moment::Recorded)?;
        run.at(Moment::Closing)?;
        Ok(json!({"success": true}))
    }
}

impl Tagging<String> {
    /// Sets all of them or none: one transaction.
    pub fn create(&self, run: &Run) -> Result<Value, Stop> {
        run.at(Moment::Working)?;
        run.last(1.0)?;
        {
            let mut world = run.core.world.lock();
            for id in &self.resources {
                let there = self.of(&mut world, id)?;
                if let Some((key, _)) = self.tags.iter().find(|(_, value)| value.is_empty()) {
                    let text = format!("Value for the key {key} is either null or empty");
                    return Err(Failure::parameter(text).into());
                }
                // The column's collation does not tell cases apart.
                let taken = |key: &str| there.keys().any(|k| k.eq_ignore_ascii_case(key));
                if let Some((key, _)) = self.tags.iter().find(|(key, _)| taken(key)) {
                    return Err(Failure::internal(format!("tag {key} already on {} with id {id}", self.kind)).into());
                }
            }
            for id in &self.resources {
                self.of(&mut world, id)?.extend(self.tags.iter().cloned());
                world.record(Effect::Tagged, id, run.by_admin);
            }
            run.core.tell(&mut world);
        }
        Self::ends(run)
    }
}

impl Tagging<Option<String>> {
    /// Removes what matches by key, and by value where one is given; without any tag, all of them.
    pub fn delete(&self, run: &Run) -> Result<Value, Stop> {
        run.at(Moment::Working)?;
        run.last(1.0)?;
        {
            let mut world = run.core.world.lock();
            let matches = |key: &str, value: &str| {
                let one = |(k, v): &(String, Option<String>)| {
                    k.eq_ignore_ascii_case(key) && v.as_ref().is_none_or(|v| v.eq_ignore_ascii_case(value))
                };
                self.tags.is_empty() || self.tags.iter().any(one)
            };
            let mut any = false;
            for id in &self.resources {
                let there = self.of(&mut world, id)?;
                let before = there.len();
                there.retain(|key, value| !matches(key, value));
                if there.len() < before {
                    any = true;
                    world.record(Effect::Untagged, id, run.by_admin);
                }
            }
            run.core.tell(&mut world);
            if !any {
                return Err(Failure::internal("Failed to delete tags").into());
            }
        }
        Self::ends(run)
    }
}
