//! Many seeded schedules of random commands, faults and restarts, and what must hold in all of them.

use std::sync::Arc;
use std::time::Duration;

use super::super::world::World;
use super::super::{Engine, Target};
use super::fakes::*;
use crate::cloud::Refusal;
use crate::command::Action;
use crate::model::{JobRow, Mark, RecordId, Status, VmId, VolumeId};

/// Marsaglia's xorshift64: the same numbers for the same seed, everywhere.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap() % sides
    }
}

struct Play {
    lab: Lab,
    engine: Arc<Engine>,
    dice: Dice,
    vm: VmId,
    foreign: VolumeId,
    theirs: Mark,
    serial: usize,
    /// The life of `engine`.
    life: u64,
}

impl Play {
    fn check(&self, world: &World, seed: u64) {
        let state = self.lab.state();
        assert_eq!(state.sky.violations, Vec::<String>::new(), "seed {seed}\n{}", state.log.join("\n"));
        assert_eq!(state.sky.volumes[&self.foreign].mark, Some(self.theirs), "seed {seed}");
        assert_eq!(state.sky.volumes[&self.foreign].attached, None, "seed {seed}");
        drop(state);
        for (row, volume) in &world.volumes {
            if let Ok(now) = self.engine.device(*row) {
                let disks = self.lab.disks_of(volume.uuid);
                assert_eq!(disks.len(), 1, "seed {seed}");
                assert_eq!((now.incarnation, &now.name), (disks[0].incarnation, &disks[0].name), "seed {seed}");
            }
            assert_eq!(world.by_uuid.get(&volume.uuid), Some(row), "seed {seed}");
            assert_eq!(world.jobs[&volume.job].disks.get(&volume.disk), Some(row), "seed {seed}");
        }
        let listed: usize = world.jobs.values().map(|j| j.disks.len()).sum();
        assert_eq!((listed, world.by_uuid.len()), (world.volumes.len(), world.volumes.len()), "seed {seed}");
        // One operation in flight a volume: every other one of it has ended.
        let mut busy = std::collections::BTreeSet::new();
        for op in world.operations.values().filter(|o| o.ended.is_none()) {
            if let Some(volume) = op.volume
                && world.by_uuid.contains_key(&volume)
            {
                assert!(busy.insert(volume), "seed {seed}: two operations on {volume}");
            }
        }
    }

    fn command(&mut self) -> (Target, Action) {
        let world = self.engine.world();
        let rows: Vec<_> = world.volumes.iter().map(|(r, v)| (*r, v.uuid)).collect();
        let jobs: Vec<JobRow> = world.jobs.keys().copied().collect();
        let Some(job) = jobs.get(self.dice.roll(jobs.len().max(1))).copied() else {
            return (Target::Root, Action::Reconcile { vm: None });
        };
        let other = job_id(["j", "k"][self.dice.roll(2)]);
        if rows.is_empty() || (rows.len() < 3 && self.dice.roll(4) == 0) {
            self.serial += 1;
            return (Target::Job(job), create(&format!("d{}", self.serial), GIB));
        }
        let (row, volume) = rows[self.dice.roll(rows.len())];
        let on = Target::Volume(row);
        match self.dice.roll(20) {
            0..4 => (on, attach()),
            4..8 => (on, detach()),
            8 => (on, Action::Attach { vm: Some(self.vm), slot: None }),
            9 => (on, Action::Detach { vm: Some(self.vm), force: self.dice.roll(2) == 0 }),
            10 => (on, Action::Resize { size: GIB * (1 + self.dice.roll(3) as u64) }),
            11 => (on, Action::Move { job: other }),
            12 => (on, Action::Reconcile { vm: None }),
            13 => (on, delete(volume)),
            14 => (Target::Job(job), [attach(), detach(), Action::Destroy { job: other }][self.dice.roll(3)].clone()),
            15 => (on, [snapshot("s"), snapshot("t"), revert("s")][self.dice.roll(3)].clone()),
            16 => (on, delete_snapshot(["s", "t"][self.dice.roll(2)])),
            17 => (Target::Job(job), [snapshot("s"), snapshot("t"), revert("s")][self.dice.roll(3)].clone()),
            18 => (Target::Job(job), delete_snapshot(["s", "t"][self.dice.roll(2)])),
            _ => {
                let claimed = [self.foreign, volume][self.dice.roll(2)];
                (Target::Job(job), Action::Claim { volume: claimed, disk: None, from: None })
            }
        }
    }

    fn fault(&mut self) {
        let at = [
            [At::Attach, At::Detach, At::Resize, At::Delete, At::Create, At::Mark].as_slice(),
            &[At::Find, At::Begin, At::End],
            &[At::Snapshot, At::Revert, At::DeleteSnapshot, At::Snapshots, At::FindSnapshot, At::Running],
        ]
        .concat();
        let at = at[self.dice.roll(at.len())];
        let act = match self.dice.roll(6) {
            0 => Act::Refuse(Refusal::Other),
            1 => Act::Unreachable,
            2 => Act::Ambiguous,
            3 => Act::AmbiguousDone,
            4 => Act::KillBefore,
            _ => Act::KillAfter,
        };
        self.lab.script(at, act);
    }

    async fn step(&mut self, seed: u64) {
        if self.dice.roll(3) == 0 {
            self.fault();
        }
        match self.dice.roll(12) {
            0 => self.lab.kill(),
            1 => {
                let v = self.any();
                self.lab.unplug(v);
            }
            2 => self.lab.state().kernel.muted = self.dice.roll(2) == 0,
            _ => {}
        }
        for _ in 0..1 + self.dice.roll(4) {
            let (target, action) = self.command();
            self.lab.go(&self.engine, target, action);
            self.check(&self.engine.world(), seed);
        }
        for _ in 0..self.dice.roll(8) {
            tokio::time::sleep(Duration::from_millis(700)).await;
            self.check(&self.engine.world(), seed);
        }
        if self.lab.life() != self.life {
            self.restart().await;
        }
        for name in ["j", "k"] {
            if !self.engine.world().job_rows.contains_key(&job_id(name)) {
                // It may fail like everything else here.
                self.engine.make_job(job_id(name), root()).wait().await.ok();
            }
        }
    }

    async fn restart(&mut self) {
        self.engine = self.lab.begin();
        self.life = self.lab.life();
        // The script may have another kill for the first round.
        tokio::time::timeout(Duration::from_secs(5), self.engine.first_round()).await.ok();
    }

    /// With the faults over, everything comes to rest by itself, and the truth is told.
    async fn rest(&mut self, seed: u64) {
        {
            let mut state = self.lab.state();
            state.script.clear();
            state.kernel.muted = false;
        }
        if self.lab.life() != self.life {
            self.restart().await;
        }
        let all: Vec<_> = self.lab.state().sky.volumes.values().cloned().collect();
        for volume in all {
            let here = volume.attached.is_some_and(|a| a.vm == self.lab.host);
            match (here, self.lab.disks_of(volume.id).is_empty()) {
                (true, true) => drop(self.lab.plug(volume.id, volume.size)),
                (false, false) => self.lab.unplug(volume.id),
                _ => {}
            }
        }
        self.lab.until(&format!("seed {seed}: all ends"), |s| s.record.ops.values().all(|o| o.ended.is_some())).await;
        tokio::time::sleep(Duration::from_secs(180)).await;
        let world = self.engine.world();
        self.check(&world, seed);
        for volume in world.volumes.values() {
            assert!(volume.running.is_none(), "seed {seed}: {volume:?}");
            let seen = self.lab.cloud_of(volume.uuid);
            let truth = match seen.as_ref().map(|s| s.attached.map(|a| a.vm)) {
                None => Status::Missing,
                Some(None) => Status::Detached,
                Some(Some(vm)) if vm == self.lab.host => Status::Attached,
                Some(Some(_)) => Status::Remote,
            };
            assert_eq!(volume.status(), truth, "seed {seed}: {volume:?}\n{}", self.lab.state().log.join("\n"));
            assert_eq!(
                self.lab.recorded(volume.uuid),
                truth,
                "seed {seed}: {volume:?}\n{}",
                self.lab.state().log.join("\n")
            );
            if let Some(seen) = seen {
                let mark = Mark { record: self.lab.record_id(), epoch: volume.epoch };
                assert_eq!(seen.mark, Some(mark), "seed {seed}");
            }
        }
        // Every snapshot that was taken is in the record, and the world shows those of its volumes.
        super::snapshots::no_orphans(&self.lab);
        let known: usize = world.volumes.values().map(|v| v.snapshots.ours().count()).sum();
        assert_eq!(known, world.snapshots.len(), "seed {seed}");
        for (row, volume) in &world.snapshots {
            assert!(world.volumes[volume].snapshots.ours().any(|(r, _)| r == *row), "seed {seed}");
        }
        // What exists in the cloud with our mark is known here: owned, or in unclaimed/.
        for (id, seen) in &self.lab.state().sky.volumes {
            if seen.mark.is_some_and(|m| m.record == self.lab.record_id()) {
                let known = world.by_uuid.contains_key(id) || world.unclaimed.contains_key(id);
                assert!(known, "seed {seed}: {id} is lost");
            }
        }
    }

    fn any(&mut self) -> VolumeId {
        let all: Vec<VolumeId> = self.lab.state().sky.volumes.keys().copied().collect();
        all[self.dice.roll(all.len())]
    }
}

#[tokio::test(start_paused = true)]
async fn whatever_is_asked_and_whatever_fails_no_device_is_wrong_and_nothing_is_taken_that_is_not_ours() {
    let mut ends = std::collections::BTreeMap::new();
    let mut lives = 0;
    for seed in 1..=500u64 {
        let lab = Lab::with(|about| {
            about.detach_wants_sole_opener = seed % 2 == 0;
            about.snapshots = true;
        });
        let engine = lab.start().await;
        lab.job(&engine, "j").await;
        lab.job(&engine, "k").await;
        let theirs = Mark { record: RecordId::random(), epoch: 3 };
        let foreign = lab.foreign(GIB, Some(theirs));
        let vm = lab.vm(false);
        let life = lab.life();
        let mut play = Play { lab, engine, dice: Dice(seed * 0x9E37_79B9), vm, foreign, theirs, serial: 0, life };
        for _ in 0..12 {
            play.step(seed).await;
        }
        play.rest(seed).await;
        lives += play.life;
        for op in play.lab.state().record.ops.values() {
            *ends.entry((op.verb.as_str(), op.ended.as_ref().unwrap().0.as_str())).or_insert(0u32) += 1;
        }
        play.lab.kill();
    }
    // The schedules are worth something only as long as they reach all this.
    for verb in ["create", "attach", "detach", "resize", "move", "delete", "snapshot", "delete-snapshot"] {
        for outcome in ["done", "failed", "interrupted"] {
            assert!(ends.get(&(verb, outcome)).is_some_and(|n| *n > 3), "{verb} {outcome}: {ends:?}");
        }
    }
    assert!(ends.get(&("destroy", "done")).is_some_and(|n| *n > 10), "{ends:?}");
    assert!(lives > 600, "{lives} lives");
}
