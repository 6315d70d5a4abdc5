//! `metrics`: the Prometheus text format.

use std::collections::BTreeMap;
use std::fmt::Display;

use super::super::tree::View;
use super::{components, counts, problems, used};
use crate::engine::world::Component;
use crate::model::Status;

struct Metrics(String);

impl Metrics {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.0.push_str(&format!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        self.0.push_str(name);
        for (i, (label, text)) in labels.iter().enumerate() {
            let text = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            self.0.push_str(&format!("{}{label}=\"{text}\"", if i == 0 { "{" } else { "," }));
        }
        self.0.push_str(if labels.is_empty() { "" } else { "}" });
        self.0.push_str(&format!(" {value}\n"));
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, value: impl Display) {
        self.family(name, kind, help);
        self.sample(name, &[], value);
    }
}

/// The whole page.
pub fn text(view: &View<'_>) -> String {
    let world = view.world;
    let counters = &world.counters;
    let mut m = Metrics(String::new());

    m.family("volfs_build_info", "gauge", "Version of volfs and the provider it speaks to; always 1.");
    m.sample("volfs_build_info", &[("version", env!("CARGO_PKG_VERSION")), ("provider", world.provider)], 1);
    let started = format!("{}.{:03}", world.started.0.div_euclid(1000), world.started.0.rem_euclid(1000));
    m.one("volfs_start_time_seconds", "gauge", "When the daemon started, in seconds since 1970.", started);

    m.family("volfs_component_state", "gauge", "Which state each component is in: 1 for the present one.");
    for (name, component) in components(world) {
        let now = match component {
            Component::Ok => "ok",
            Component::Degraded(_) => "degraded",
            Component::Down(_) => "down",
        };
        for state in ["ok", "degraded", "down"] {
            m.sample("volfs_component_state", &[("component", name), ("state", state)], u8::from(state == now));
        }
    }
    let read_only = u8::from(world.read_only.is_some());
    m.one("volfs_read_only", "gauge", "1 while every changing command is refused.", read_only);
    m.one("volfs_jobs", "gauge", "Jobs.", world.jobs.len());

    let mut by_status = [0; Status::ALL.len()];
    for job in world.jobs.values() {
        by_status.iter_mut().zip(counts(view, job)).for_each(|(sum, n)| *sum += n);
    }
    m.family("volfs_volumes", "gauge", "Owned volumes by status.");
    for (status, n) in Status::ALL.into_iter().zip(by_status) {
        m.sample("volfs_volumes", &[("status", status.as_str())], n);
    }
    m.one("volfs_unclaimed_volumes", "gauge", "Volumes in no job that concern this host.", world.unclaimed.len());
    m.one("volfs_disks_used", "gauge", "Disks attached to this host.", used(world));
    m.one("volfs_disks_most", "gauge", "The most disks that this host can have attached.", world.most_disks);
    m.one("volfs_problems", "gauge", "Rows of the file problems.", problems::rows(view).len());

    let mut flying: BTreeMap<&str, u64> = BTreeMap::new();
    for op in world.operations.values().filter(|o| o.ended.is_none()) {
        *flying.entry(op.verb.as_str()).or_default() += 1;
    }
    m.family("volfs_operations_in_flight", "gauge", "Operations in flight by verb.");
    for (verb, n) in flying {
        m.sample("volfs_operations_in_flight", &[("verb", verb)], n);
    }
    m.family("volfs_operations_total", "counter", "Operations that ended, by verb and outcome.");
    for ((verb, outcome), n) in &counters.operations {
        m.sample("volfs_operations_total", &[("verb", verb.as_str()), ("outcome", outcome)], n);
    }
    m.family("volfs_refusals_total", "counter", "Commands that were refused before anything began, by errno.");
    for (errno, n) in &counters.refusals {
        m.sample("volfs_refusals_total", &[("errno", errno)], n);
    }
    m.one("volfs_forced_detaches_total", "counter", "Commands given with force.", counters.forced);
    m.one("volfs_abandoned_total", "counter", "Operations that were abandoned.", counters.abandoned);
    m.one("volfs_drift_total", "counter", "Volumes found attached or detached behind volfs's back.", counters.drift);
    m.one("volfs_reconciles_total", "counter", "Rounds of reconciling.", counters.reconciles);
    m.0
}
