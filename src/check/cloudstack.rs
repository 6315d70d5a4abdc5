//! The CloudStack provider's part of `volfs check`: reads alone. "Page" is shared/reference/cloudstack-api.md.
//!
//! Each line stands for itself as far as it can; after an endpoint that does not answer, or keys that
//! are not taken, nothing more can be told.

use std::time::SystemTime;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{Line, Part, Verdict};
use crate::cloud::cloudstack::whoami::{self, Host};
use crate::cloud::cloudstack::{self, ApiError, Client, sign};
use crate::cloud::{Cloud, CloudVolume, Survey};
use crate::config::Config;
use crate::daemon::{cloudstack_client, cloudstack_provider};
use crate::devices::{self, Devices, KernelDevices};
use crate::engine;
use crate::model::{Timestamp, VmId};

/// Seconds by which clocks may differ without a word.
const CLOCK_CLOSE: i64 = 60;

/// Asks the cloud for each thing that volfs needs of it.
pub(super) fn lines(config: &Config) -> Vec<Line> {
    let mut lines = Lines::default();
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(ask(config, &mut lines)),
        Err(error) => lines.missing("cloud", format!("it cannot be asked: {error}")),
    }
    lines.0
}

#[derive(Default)]
struct Lines(Vec<Line>);

impl Lines {
    fn good(&mut self, name: &'static str, words: impl Into<String>) {
        self.0.push((name.into(), Verdict::Good(words.into())));
    }

    fn warning(&mut self, name: &'static str, words: impl Into<String>) {
        self.0.push((name.into(), Verdict::Warning(words.into())));
    }

    fn missing(&mut self, name: &'static str, words: impl Into<String>) {
        self.0.push((name.into(), Verdict::Missing(words.into())));
    }

    fn part(&mut self, name: &'static str, part: Part) {
        self.0.push((name.into(), part.into()));
    }
}

/// A VM, as far as `check` looks.
#[derive(Debug, Deserialize)]
struct Vm {
    id: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    state: String,
    hypervisor: Option<String>,
    backupofferingid: Option<String>,
    backupofferingname: Option<String>,
}

async fn ask(config: &Config, lines: &mut Lines) {
    let client = match cloudstack_client(&config.cloudstack) {
        Ok(client) => client,
        Err(problem) => return lines.missing("keys", problem.to_string()),
    };
    if !answers(&client, lines).await {
        return;
    }
    permissions(&client, lines).await;
    let host = whoami::find(config.cloudstack.host).await;
    // Zone and offering can be told without it, unless the zone is this host's.
    let id = host.as_ref().map_or(VmId(uuid::Uuid::nil()), |host| host.id);
    let provider = cloudstack_provider(config, client.clone(), id);
    if host.is_ok() || config.cloudstack.zone.is_some() {
        let zone = provider.default_zone().await;
        let from = if config.cloudstack.zone.is_some() { "configuration" } else { "that of this host" };
        lines.part("zone", zone.map(|zone| format!("{zone} ({from})")).map_err(|e| e.to_string()));
    }
    lines.part("offering", provider.default_offering().await.map_err(|e| e.to_string()));
    match host {
        Err(words) => lines.missing("this VM", words),
        Ok(host) => {
            let survey = Survey { vms: vec![host.id], ..Survey::default() };
            match provider.survey(&survey).await {
                Err(error) => lines.missing("this VM", format!("{host}: its volumes cannot be seen: {error}")),
                Ok(volumes) => this_vm(config, &client, &host, &volumes, lines).await,
            }
        }
    }
}

/// The endpoint, the keys, the clock; whether more can be asked.
async fn answers(client: &Client, lines: &mut Lines) -> bool {
    let at = client.endpoint();
    let outcome = client.read("listCapabilities", &[]).await;
    let words = match &outcome {
        Err(error @ (ApiError::NotSent { .. } | ApiError::NoAnswer { .. })) => {
            lines.missing("endpoint", error.to_string());
            return false;
        }
        Ok(answer) => match answer.pointer("/capability/cloudstackversion").and_then(Value::as_str) {
            Some(version) => format!("{at} answers, CloudStack {version}"),
            None => format!("{at} answers"),
        },
        Err(_) => format!("{at} answers"),
    };
    if client.is_open() {
        lines
            .warning("endpoint", format!("{words}; it is not TLS: others on the way can read and change what is said"));
    } else {
        lines.good("endpoint", words);
    }
    let known = match outcome {
        // The role forbids this one command, and said so before it looked at the signature.
        Ok(_) | Err(ApiError::Api { code: 401, .. }) => Ok(format!("taken, from {}", client.source())),
        Err(error) => Err(error.to_string()),
    };
    let taken = known.is_ok();
    clock(client.clock_ahead(), taken, lines);
    lines.part("keys", known);
    taken
}

/// How far the clocks are apart: a request is believed until it expires (page 1.3).
fn clock(ahead: Option<i64>, taken: bool, lines: &mut Lines) {
    let now = Timestamp::from(SystemTime::now());
    let lifetime = sign::LIFETIME.as_secs();
    let Some(ahead) = ahead else {
        let words = "the server sends no Date";
        return if taken {
            lines.good("clock", format!("{words}; it took a request that expires after {lifetime} s"));
        } else {
            lines.warning("clock", format!("{words}, so it cannot be told how far it is from the time here, {now}"));
        };
    };
    let side = if ahead < 0 { "behind" } else { "ahead" };
    let words = format!("the server's is {} s {side} of the one here, {now}", ahead.unsigned_abs());
    if ahead.unsigned_abs() >= lifetime {
        lines.missing("clock", format!("{words}: requests expire after {lifetime} s; set it by NTP"));
    } else if ahead.abs() > CLOCK_CLOSE {
        lines.warning("clock", format!("{words}: set it by NTP"));
    } else {
        lines.good("clock", words);
    }
}

/// One request a command: all at once would exceed the account's rate limit by itself (page 1.8).
async fn permissions(client: &Client, lines: &mut Lines) {
    let mut allowed = 0;
    let mut forbidden = false;
    for command in cloudstack::commands() {
        match client.read("listApis", &[("name", command)]).await {
            Ok(answer) if has(&answer, command) => allowed += 1,
            Err(error @ ApiError::Api { code: 401, .. }) => {
                return lines.warning("permissions", format!("they cannot be told: listApis: {error}"));
            }
            // A role without the command: nothing of that name, in words that differ by version.
            Ok(_) | Err(ApiError::Api { .. }) => {
                forbidden = true;
                let words = "the role of these keys does not allow it, or the cloud is too old: add the rule";
                lines.0.push((format!("permission {command}").into(), Verdict::Missing(words.into())));
            }
            Err(error) => return lines.missing("permissions", error.to_string()),
        }
    }
    if !forbidden {
        lines.good("permissions", format!("all {allowed} commands that volfs needs, createTags among them"));
    }
}

fn has(answer: &Value, command: &str) -> bool {
    let rows = answer.get("api").and_then(Value::as_array);
    rows.is_some_and(|rows| rows.iter().any(|row| row.get("name").and_then(Value::as_str) == Some(command)))
}

/// Whether this is the VM that it is said to be, has room, and what is in the way of attaching to it.
async fn this_vm(config: &Config, client: &Client, host: &Host, volumes: &[CloudVolume], lines: &mut Lines) {
    let disks = KernelDevices::start(devices::Options { uevents: false, ..devices::Options::default() })
        .and_then(|devices| devices.disks());
    let here = match &disks {
        Ok(disks) => engine::is_here(host.id, volumes, disks).map_err(|why| why.to_string()),
        Err(error) => Err(error.to_string()),
    };
    lines.part(
        "this VM",
        match here {
            Ok(()) => Ok(format!("{host}, its root disk is here")),
            Err(why) => Err(format!("{host}: {why}")),
        },
    );
    let used = volumes.iter().filter(|v| v.attached.is_some_and(|a| a.vm == host.id && a.device_id != Some(0))).count();
    let most = usize::try_from(config.cloudstack.most_disks).unwrap_or(usize::MAX);
    let slots = format!("{used} of {most} data disks are attached here");
    if used < most {
        lines.good("device slots", slots);
    } else {
        lines.warning("device slots", format!("{slots}: nothing more can be attached before something is detached"));
    }
    machine(config, client, host, lines).await;
    vm_snapshots(config, client, host, lines).await;
    snapshot_policies(client, volumes, lines).await;
}

/// A list that only warns: a role without the command, or a failure, is said and no more.
async fn look<T: DeserializeOwned>(
    client: &Client,
    name: &'static str,
    (command, params, key): (&str, &[(&str, &str)], &str),
    lines: &mut Lines,
) -> Option<Vec<T>> {
    match client.list(command, params, key).await {
        Ok(rows) => Some(rows),
        Err(error) => {
            lines.warning(name, format!("it cannot be told: {command}: {error}"));
            None
        }
    }
}

fn scope(config: &Config) -> (&str, &str) {
    config.cloudstack.project.as_deref().map_or(("listall", "true"), |project| ("projectid", project))
}

/// The VM's own row: what it runs on, and whether backups forbid to attach (page 2.3).
async fn machine(config: &Config, client: &Client, host: &Host, lines: &mut Lines) {
    let id = host.id.to_string();
    let params = [("id", id.as_str()), scope(config)];
    let rows = look::<Vm>(client, "hypervisor", ("listVirtualMachines", &params, "virtualmachine"), lines).await;
    let Some(rows) = rows else { return };
    let Some(vm) = rows.into_iter().find(|vm| vm.id == id) else {
        return lines.missing("hypervisor", format!("the cloud shows no VM {id} to these keys"));
    };
    let name = &vm.name;
    match vm.hypervisor.as_deref() {
        Some(kind) if kind.eq_ignore_ascii_case("KVM") => lines.good("hypervisor", "KVM"),
        kind => lines.warning(
            "hypervisor",
            format!(
                "{}: disks are known here by the serials that KVM gives them; on others attach ends with ETIMEDOUT, \
                 unless the disks carry the volume's id",
                kind.unwrap_or("the cloud does not tell which")
            ),
        ),
    }
    if vm.state != "Running" {
        lines.warning("state", format!("the cloud says that {name} is {}, and it runs volfs", vm.state));
    }
    if vm.backupofferingid.is_some() {
        let offering = vm.backupofferingname.as_deref().unwrap_or("without a name");
        lines.warning(
            "backups",
            format!(
                "{name} is in the backup offering {offering}: attach and detach are refused, unless the cloud sets \
                 backup.enable.attach.detach.of.volumes; take it out of the offering"
            ),
        );
    } else {
        lines.good("backups", "this VM is in no backup offering");
    }
}

/// Any VM snapshot refuses every attach and detach (page 2.9).
async fn vm_snapshots(config: &Config, client: &Client, host: &Host, lines: &mut Lines) {
    let id = host.id.to_string();
    let params = [("virtualmachineid", id.as_str()), scope(config)];
    let found = look::<Value>(client, "VM snapshots", ("listVMSnapshot", &params, "vmSnapshot"), lines).await;
    match found.as_deref() {
        None => {}
        Some([]) => lines.good("VM snapshots", "this VM has none"),
        Some(rows) => {
            let shown = |row: &Value| {
                let name = row.get("displayname").or_else(|| row.get("name")).and_then(Value::as_str);
                name.unwrap_or("without a name").to_owned()
            };
            let names: Vec<String> = rows.iter().map(shown).collect();
            lines.warning(
                "VM snapshots",
                format!(
                    "this VM has {}: attach and detach are refused until they are deleted, and nobody should take one \
                     of a migration host",
                    names.join(", ")
                ),
            );
        }
    }
}

/// A scheduled snapshot of any disk here runs in this VM's queue, before attach and detach (page 2.8).
async fn snapshot_policies(client: &Client, volumes: &[CloudVolume], lines: &mut Lines) {
    let mut with = Vec::new();
    for volume in volumes {
        let id = volume.id.to_string();
        let call = ("listSnapshotPolicies", &[("volumeid", id.as_str())][..], "snapshotpolicy");
        match look::<Value>(client, "snapshot policies", call, lines).await {
            None => return,
            Some(rows) if rows.is_empty() => {}
            Some(_) => with.push(id),
        }
    }
    if with.is_empty() {
        lines.good("snapshot policies", "none on this VM's volumes");
    } else {
        lines.warning(
            "snapshot policies",
            format!("on {}: attach and detach here wait while their snapshots are taken", with.join(", ")),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(ahead: Option<i64>, taken: bool) -> Verdict {
        let mut lines = Lines::default();
        clock(ahead, taken, &mut lines);
        lines.0.pop().unwrap().1
    }

    #[test]
    fn a_clock_is_good_doubtful_or_wrong_by_how_far_it_is() {
        let lifetime = i64::try_from(sign::LIFETIME.as_secs()).unwrap();
        assert!(matches!(of(Some(3), true), Verdict::Good(words) if words.contains("3 s ahead")));
        assert!(matches!(of(Some(-90), true), Verdict::Warning(words) if words.contains("90 s behind")));
        assert!(matches!(of(Some(lifetime), false), Verdict::Missing(_)));
        assert!(matches!(of(Some(-lifetime), true), Verdict::Missing(_)));
        assert!(matches!(of(None, true), Verdict::Good(_)));
        assert!(matches!(of(None, false), Verdict::Warning(words) if words.contains("cannot be told")));
    }
}
