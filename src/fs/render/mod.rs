//! What a file says: pure texts from one [`World`](crate::engine::World), and for `device` and
//! `incarnation` from the kernel's answer of this moment.

use std::borrow::Cow;
use std::fmt::Write as _;

use super::node::{JobFile, Node, RootFile, UnclaimedFile, VolumeFile};
use super::tree::View;
use crate::engine::world::{Component, ErrorText, HistoryRow, Job, Volume, World};
use crate::error::{Errno, Error};
use crate::model::{DiskName, DiskRow, Holder, Status, Verb};

mod control;
mod info;
mod metrics;
mod problems;

#[cfg(test)]
mod tests;

/// The text of `version`.
pub const VERSION: &str = concat!("volfs ", env!("CARGO_PKG_VERSION"), " abi 1\n");

/// What the file says now. ESTALE when its object is gone, ENODEV where there is no device, ENODATA
/// for what cannot be told.
/// `holders` and `events` are not texts of a moment and are not asked for here.
pub fn text(view: &View<'_>, node: Node) -> Result<String, Errno> {
    let world = view.world;
    Ok(match node {
        Node::Root(RootFile::Version) => VERSION.into(),
        Node::Root(RootFile::Health) => health(world),
        Node::Root(RootFile::Problems) => problems::text(view),
        Node::Root(RootFile::Error) => error(world.error.as_deref()),
        Node::Root(RootFile::Table) => table(view, world.job_rows.values().filter_map(|r| world.jobs.get(r))),
        Node::Root(RootFile::History) => history(world.history.iter()),
        Node::Root(RootFile::Limits) => format!("used\tmost\n{}\t{}\n", used(world), world.most_disks),
        Node::Root(RootFile::Metrics) => metrics::text(view),
        Node::Job(row, file) => {
            let job = view.job(row)?;
            match file {
                JobFile::Status => job_status(view, job),
                JobFile::Error => error(job.error.as_deref()),
                JobFile::Table => table(view, [job].into_iter()),
                JobFile::History => history(job.history.iter()),
                // Ours, not foreign: one line without control characters, shown as it was written.
                JobFile::VmName => format!("{}\n", job.vm_name.0),
                JobFile::Hold => line(if job.hold.0 { "1" } else { "0" }),
                _ => return Err(Errno::EIO),
            }
        }
        Node::Volume(row, file) => volume(view, row, file)?,
        Node::Control(target, _) => control::text(view, target)?,
        Node::Operation(id) => info::operation(world.operations.get(&id).ok_or(Errno::ESTALE)?),
        Node::Snapshot(_) | Node::ForeignSnapshot(_) => info::snapshot(view.snapshot(node)?),
        Node::Unclaimed(hash, file) => {
            let (_, u) = view.unclaimed(hash)?;
            match file {
                UnclaimedFile::Name => line(&u.cloud.name),
                UnclaimedFile::Size => line(&u.cloud.size.to_string()),
                UnclaimedFile::Device => line(&u.device.as_ref().map_or(String::new(), |d| format!("/dev/{d}"))),
                UnclaimedFile::Serial => line(&u.serial),
                UnclaimedFile::Owner => line(&u.cloud.mark.map_or(String::new(), |m| m.to_string())),
                UnclaimedFile::Reason => line(&u.reason),
                _ => return Err(Errno::EIO),
            }
        }
        _ => return Err(Errno::EIO),
    })
}

/// The length of [`text`], for st_size: of `device` and `incarnation` as last verified; 0 without one,
/// and of what cannot be told.
pub fn size(view: &View<'_>, node: Node) -> Result<usize, Errno> {
    match node {
        Node::Volume(row, VolumeFile::Device) => {
            Ok(view.volume(row)?.device().map_or(0, |m| "/dev/\n".len() + m.name.len()))
        }
        Node::Volume(row, VolumeFile::Incarnation) => {
            Ok(view.volume(row)?.device().map_or(0, |m| m.incarnation.to_string().len() + 1))
        }
        node => match text(view, node) {
            // What cannot be told fails at open; stat works all the same.
            Err(Errno::ENODATA) => Ok(0),
            text => text.map(|t| t.len()),
        },
    }
}

fn volume(view: &View<'_>, row: DiskRow, file: VolumeFile) -> Result<String, Errno> {
    let volume = view.volume(row)?;
    let number = |n: Option<u32>| n.map_or(String::new(), |n| n.to_string());
    Ok(match file {
        VolumeFile::Status => line(volume.status().as_str()),
        VolumeFile::Device => {
            let now = device(view, volume)?;
            line(&format!("/dev/{}", now.name))
        }
        VolumeFile::Incarnation => line(&device(view, volume)?.incarnation.to_string()),
        VolumeFile::Error => error(volume.error.as_deref()),
        VolumeFile::History => history(volume.history.iter()),
        VolumeFile::Name => line(&volume.name),
        VolumeFile::Size => line(&volume.size.to_string()),
        // While nobody can tell where it is, an empty line would say "nowhere" (rules R1 and R9).
        VolumeFile::Vm | VolumeFile::DeviceId if volume.base == Status::Unknown => return Err(Errno::ENODATA),
        VolumeFile::Vm => line(&volume.vm.map_or(String::new(), |vm| vm.to_string())),
        VolumeFile::DeviceId => line(&number(volume.device_id)),
        VolumeFile::Serial => line(&volume.serial),
        VolumeFile::CloudState => line(&volume.cloud_state),
        VolumeFile::Owner => line(&volume.owner),
        VolumeFile::Info => info::volume(view, volume),
        _ => return Err(Errno::EIO),
    })
}

/// Verified now, and withdrawn from the first moment of a detach.
fn device(view: &View<'_>, volume: &Volume) -> Result<crate::engine::DeviceNow, Errno> {
    volume.device().ok_or(Errno::ENODEV)?;
    view.core.device(volume.row).map_err(|e| e.errno())
}

/// One line: control characters and backslashes as `\011`, so that a foreign name is always one.
pub fn line(value: &str) -> String {
    let mut text = escape(value).into_owned();
    text.push('\n');
    text
}

/// Control characters and backslashes as three octal digits a byte.
pub fn escape(value: &str) -> Cow<'_, str> {
    if !value.chars().any(|c| c.is_control() || c == '\\') {
        return Cow::Borrowed(value);
    }
    let mut text = String::with_capacity(value.len() + 8);
    for c in value.chars() {
        if c.is_control() || c == '\\' {
            for byte in c.encode_utf8(&mut [0; 4]).bytes() {
                // Writing to a String cannot fail.
                let _ = write!(text, "\\{byte:03o}");
            }
        } else {
            text.push(c);
        }
    }
    Cow::Owned(text)
}

/// A table's cell: `-` for none, so that `read` keeps its columns.
pub fn cell(value: &str) -> Cow<'_, str> {
    if value.is_empty() { Cow::Borrowed("-") } else { escape(value) }
}

fn row(text: &mut String, cells: &[&str]) {
    for (i, value) in cells.iter().enumerate() {
        if i > 0 {
            text.push('\t');
        }
        text.push_str(&cell(value));
    }
    text.push('\n');
}

fn component(c: &Component) -> (&'static str, &str) {
    match c {
        Component::Ok => ("ok", ""),
        Component::Degraded(why) => ("degraded", why),
        Component::Down(why) => ("down", why),
    }
}

/// The keeper, which not every daemon has, is named while something is wrong with it.
fn components(world: &World) -> Vec<(&'static str, &Component)> {
    let h = &world.health;
    let mut all = vec![("cloud", &h.cloud), ("store", &h.store), ("devices", &h.devices)];
    all.push(("reconciler", &h.reconciler));
    all.extend((h.keeper != Component::Ok).then_some(("keeper", &h.keeper)));
    all
}

fn health(world: &World) -> String {
    let all = components(world);
    let worst = if all.iter().any(|(_, c)| matches!(c, Component::Down(_))) {
        "down"
    } else if all.iter().any(|(_, c)| matches!(c, Component::Degraded(_))) {
        "degraded"
    } else {
        "ok"
    };
    let mut text = format!("{worst}\n");
    for (name, c) in all {
        match component(c) {
            (word, "") => text.push_str(&format!("{name} {word}\n")),
            (word, why) => text.push_str(&format!("{name} {word}: {}\n", escape(why))),
        }
    }
    if let Some(why) = &world.read_only {
        text.push_str(&format!("read-only: {}\n", escape(why)));
    }
    text
}

/// `error`: a line each with time, verb, the caller's pid, the errno's name and the sentence.
fn error(error: Option<&ErrorText>) -> String {
    let Some(e) = error else { return "\n".into() };
    let mut text = String::new();
    let mut add = |errno: Errno, sentence: &str| {
        for part in sentence.lines().filter(|part| !part.is_empty()) {
            text.push_str(&format!("{} {} pid {} {errno}: {}\n", e.at, escape(&e.verb), e.pid, escape(part)));
        }
    };
    match &e.error {
        Error::Several { lines } => {
            for (disk, one) in lines {
                add(one.errno(), &format!("{disk}: {one}"));
            }
        }
        one => add(one.errno(), &one.to_string()),
    }
    if text.is_empty() { "\n".into() } else { text }
}

/// `history`: oldest first. Columns after `command` are beyond the contract's and come last.
fn history<'a>(rows: impl Iterator<Item = &'a std::sync::Arc<HistoryRow>>) -> String {
    let mut text =
        String::from("time\toperation\tjob\tdisk\tuuid\toutcome\tseconds\tuid\tpid\tcommand\tid\tsentence\n");
    for h in rows {
        let seconds = format!("{}.{:03}", h.took_ms / 1000, h.took_ms % 1000);
        row(
            &mut text,
            &[
                &h.at.to_string(),
                h.verb.as_str(),
                h.job.as_ref().map_or("", |j| j.as_str()),
                h.disk.as_ref().map_or("", DiskName::as_str),
                &h.volume.map_or(String::new(), |v| v.to_string()),
                h.outcome.as_str(),
                &seconds,
                &h.caller.uid.to_string(),
                &h.caller.pid.to_string(),
                &h.caller.comm,
                &h.op.to_string(),
                &h.sentence,
            ],
        );
    }
    text
}

/// `table`: the jobs' volumes by disk name; what is being created has no UUID yet.
fn table<'a>(view: &View<'_>, jobs: impl Iterator<Item = &'a std::sync::Arc<Job>>) -> String {
    let mut text = String::from("job\tdisk\tuuid\tname\tstatus\tdevice\tvm\tsize\n");
    for job in jobs {
        let mut rows: Vec<(&DiskName, Option<&Volume>)> =
            job.disks.iter().filter_map(|(disk, r)| Some((disk, Some(&**view.volume(*r).ok()?)))).collect();
        rows.extend(creating(view.world, job).map(|disk| (disk, None)));
        rows.sort_by_key(|(disk, _)| *disk);
        for (disk, volume) in rows {
            let Some(v) = volume else {
                row(&mut text, &[job.id.as_str(), disk.as_str(), "", "", Status::Creating.as_str(), "", "", ""]);
                continue;
            };
            let device = v.device().map_or(String::new(), |m| format!("/dev/{}", m.name));
            row(
                &mut text,
                &[
                    job.id.as_str(),
                    disk.as_str(),
                    &v.uuid.to_string(),
                    &v.name,
                    v.status().as_str(),
                    &device,
                    &v.vm.map_or(String::new(), |vm| vm.to_string()),
                    &v.size.to_string(),
                ],
            );
        }
    }
    text
}

/// The disks that a `create` is making. A claim in flight changes nothing until it is done.
fn creating<'a>(world: &'a World, job: &'a Job) -> impl Iterator<Item = &'a DiskName> {
    let new = job.creating.iter().filter(|(disk, op)| {
        let claim = world.operations.get(*op).is_some_and(|o| o.verb == Verb::Claim);
        !claim && !job.disks.contains_key(*disk)
    });
    new.map(|(disk, _)| disk)
}

/// Volumes by status, what is being created included.
fn counts(view: &View<'_>, job: &Job) -> [usize; Status::ALL.len()] {
    let mut counts = [0; Status::ALL.len()];
    let known = job.disks.values().filter_map(|r| view.volume(*r).ok()).map(|v| v.status());
    for status in known.chain(creating(view.world, job).map(|_| Status::Creating)) {
        counts[status as usize] += 1;
    }
    counts
}

/// Whether the status says that something is not in order.
fn in_doubt(status: Status) -> bool {
    matches!(status, Status::Lost | Status::Missing | Status::Unknown | Status::Conflict)
}

fn job_status(view: &View<'_>, job: &Job) -> String {
    let counts = counts(view, job);
    let named = || Status::ALL.into_iter().zip(counts).filter(|(_, n)| *n > 0);
    let acting = job.disks.values().filter_map(|r| view.volume(*r).ok()).any(|v| v.running.is_some());
    let word = if acting || job.running.is_some() || !job.creating.is_empty() {
        "busy"
    } else if named().any(|(s, _)| in_doubt(s)) {
        "degraded"
    } else {
        "idle"
    };
    let mut text = String::from(word);
    for (status, n) in named() {
        text.push_str(&format!(" {status}={n}"));
    }
    text.push('\n');
    text
}

/// Disks on this VM, those of no job included.
fn used(world: &World) -> usize {
    let owned = world.volumes.values().filter(|v| v.vm == Some(world.host)).count();
    let others = world.unclaimed.values().filter(|u| u.cloud.attached.is_some_and(|a| a.vm == world.host));
    owned + others.count()
}

/// `holders`: a table, with its header only when nobody has the device.
pub fn holders(all: &[Holder]) -> String {
    let mut text = String::from("kind\tpid\tcommand\n");
    for h in all {
        row(&mut text, &[h.kind.as_str(), &h.pid.map_or(String::new(), |p| p.to_string()), &h.name]);
    }
    text
}
