//! `reconcile::settle` over every combination of what record, cloud and kernel can say.

use super::super::reconcile::{CloudView, Finding, Recorded, Rules, Unmarked, settle};
use super::fakes::GIB;
use crate::cloud::{Attachment, CloudVolume};
use crate::model::{BootId, DevNo, Disk, DiskIdentity, Incarnation, Mark, RecordId, Status, VmId, VolumeId};

const SETTLED: [Status; 7] = [
    Status::Detached,
    Status::Attached,
    Status::Remote,
    Status::Lost,
    Status::Missing,
    Status::Unknown,
    Status::Conflict,
];

#[derive(Clone, Debug)]
enum View {
    Unseen,
    Absent(bool),
    Seen(Box<CloudVolume>),
}

impl View {
    fn cloud(&self) -> CloudView<'_> {
        match self {
            View::Unseen => CloudView::Unseen,
            View::Absent(confirmed) => CloudView::Absent { confirmed: *confirmed },
            View::Seen(seen) => CloudView::Seen(seen),
        }
    }
}

struct Ground {
    host: VmId,
    mark: Mark,
    same: Incarnation,
    rules: Rules,
    recorded: Vec<Recorded>,
    views: Vec<View>,
    candidates: Vec<Vec<Disk>>,
}

fn ground(exact_size: bool) -> Ground {
    let (host, other, volume) = (VmId::random(), VmId::random(), VolumeId::random());
    let record = RecordId::random();
    let mark = Mark { record, epoch: 4 };
    let boot = BootId::random();
    let same = Incarnation { boot, diskseq: 5 };
    let mut recorded = Vec::new();
    for status in SETTLED {
        for mapped in [None, Some(same)] {
            let vm = match status {
                Status::Attached | Status::Lost => Some(host),
                Status::Remote => Some(other),
                _ => None,
            };
            recorded.push(Recorded { status, vm, mapped, size: GIB, mark, unmarked: None });
        }
    }
    let mut views = vec![View::Unseen, View::Absent(false), View::Absent(true)];
    for attached in [None, Some(host), Some(other)] {
        let foreign = Mark { record: RecordId::random(), epoch: 4 };
        for m in [None, Some(mark), Some(Mark { record, epoch: 3 }), Some(foreign)] {
            views.push(View::Seen(Box::new(CloudVolume {
                id: volume,
                name: "n".into(),
                size: GIB,
                state: "Ready".into(),
                attached: attached.map(|vm| Attachment { vm, device_id: None }),
                mark: m,
                carries_host: None,
                pending: None,
            })));
        }
    }
    let disk = |diskseq, size| Disk {
        name: format!("vd{diskseq}").into(),
        dev: DevNo { major: 252, minor: diskseq as u32 },
        incarnation: Incarnation { boot, diskseq },
        size,
        identity: DiskIdentity::VirtioSerial(volume.0.simple().to_string()[..20].into()),
    };
    let mut candidates = vec![Vec::new()];
    for size in [GIB, GIB / 2, 2 * GIB] {
        candidates.push(vec![disk(5, size)]);
        candidates.push(vec![disk(6, size)]);
    }
    candidates.push(vec![disk(5, GIB), disk(6, GIB)]);
    candidates.push(vec![disk(6, GIB), disk(7, GIB)]);
    Ground { host, mark, same, rules: Rules { host, exact_size }, recorded, views, candidates }
}

fn every(exact_size: bool, mut test: impl FnMut(&Ground, &Recorded, &View, &[Disk], Finding)) {
    let g = ground(exact_size);
    let mut n = 0;
    for recorded in &g.recorded {
        for view in &g.views {
            for candidates in &g.candidates {
                let finding = settle(recorded, &view.cloud(), candidates, g.rules);
                test(&g, recorded, view, candidates, finding);
                n += 1;
            }
        }
    }
    assert_eq!(n, 14 * 15 * 9, "every combination");
}

#[test]
fn v3_attached_takes_one_disk_of_the_right_size_and_the_clouds_word_or_the_same_incarnation() {
    for exact in [true, false] {
        every(exact, |g, recorded, view, candidates, finding| {
            let all = format!("{recorded:?} {view:?} {candidates:?} {finding:?}");
            if finding.status != Status::Attached {
                assert!(finding.device.is_none(), "a device without attached: {all}");
                return;
            }
            assert_eq!(candidates.len(), 1, "{all}");
            let disk = &candidates[0];
            assert_eq!(finding.device.as_ref(), Some(disk), "{all}");
            assert_eq!(finding.vm, Some(g.host), "{all}");
            let grown = recorded.mapped == Some(disk.incarnation) && disk.size >= GIB;
            assert!(disk.size == GIB || (!exact && disk.size >= GIB) || grown, "{all}");
            let cloud_says = match view {
                View::Seen(seen) => seen.attached.is_some_and(|a| a.vm == g.host) && seen.mark == Some(g.mark),
                View::Unseen => false,
                View::Absent(_) => false,
            };
            let stays = matches!(view, View::Unseen)
                && recorded.status == Status::Attached
                && recorded.mapped == Some(g.same)
                && disk.incarnation == g.same;
            assert!(cloud_says || stays, "{all}");
        });
    }
}

#[test]
fn v3_what_is_attached_stays_so_while_the_cloud_is_unreachable() {
    let g = ground(true);
    let recorded = g.recorded.iter().find(|r| r.status == Status::Attached && r.mapped.is_some()).unwrap();
    let finding = settle(recorded, &CloudView::Unseen, &g.candidates[1], g.rules);
    assert_eq!(finding.status, Status::Attached);
    let finding = settle(recorded, &CloudView::Unseen, &g.candidates[2], g.rules);
    assert_eq!(finding.status, Status::Unknown, "another incarnation is another disk until the cloud speaks");
}

#[test]
fn v8_a_foreign_mark_is_always_conflict() {
    every(true, |g, recorded, view, candidates, finding| {
        if let View::Seen(seen) = view
            && seen.mark != Some(g.mark)
        {
            assert_eq!(finding.status, Status::Conflict, "{recorded:?} {seen:?} {candidates:?}");
        }
    });
}

#[test]
fn v8_two_devices_of_one_identity_are_never_a_choice() {
    every(false, |_, recorded, view, candidates, finding| {
        if candidates.len() > 1 {
            assert_eq!(finding.status, Status::Conflict, "{recorded:?} {view:?}");
            assert!(finding.device.is_none());
        }
    });
}

#[test]
fn v8_a_device_here_that_is_free_or_elsewhere_in_the_cloud_is_conflict() {
    every(true, |g, _, view, candidates, finding| {
        if let View::Seen(seen) = view
            && seen.attached.is_none_or(|a| a.vm != g.host)
            && !candidates.is_empty()
        {
            assert_eq!(finding.status, Status::Conflict);
        }
    });
}

#[test]
fn v6_missing_is_never_found_without_confirmation() {
    every(true, |_, recorded, view, candidates, finding| {
        if finding.status == Status::Missing {
            let confirmed = matches!(view, View::Absent(true));
            let known = matches!(view, View::Unseen) && recorded.status == Status::Missing;
            assert!(confirmed || known, "{recorded:?} {view:?}");
            assert!(candidates.is_empty(), "a volume whose disk is here is not missing");
        }
        if matches!(view, View::Absent(false)) && candidates.is_empty() {
            assert_eq!(finding.status, Status::Unknown);
        }
    });
}

#[test]
fn r9_every_doubt_has_its_reason_and_no_other_status_has_one() {
    every(true, |_, recorded, view, candidates, finding| {
        let doubt = matches!(finding.status, Status::Lost | Status::Missing | Status::Unknown | Status::Conflict);
        assert_eq!(finding.why.is_some(), doubt, "{recorded:?} {view:?} {candidates:?} {finding:?}");
        assert!(!finding.status.in_flight());
    });
}

#[test]
fn settling_what_is_settled_changes_nothing() {
    for exact in [true, false] {
        every(exact, |g, recorded, view, candidates, first| {
            let again = Recorded {
                status: first.status,
                vm: first.vm,
                mapped: first.device.as_ref().map(|d| d.incarnation),
                size: match view {
                    View::Seen(seen) => seen.size,
                    _ => recorded.size,
                },
                mark: recorded.mark,
                unmarked: recorded.unmarked.clone(),
            };
            let second = settle(&again, &view.cloud(), candidates, g.rules);
            let all = format!("{recorded:?} {view:?} {candidates:?}\n{first:?}\n{second:?}");
            assert_eq!((second.status, second.vm, &second.device), (first.status, first.vm, &first.device), "{all}");
            assert!(!second.drift, "{all}");
        });
    }
}

#[test]
fn d3_growth_of_the_same_disk_is_fine_and_shrinking_is_conflict() {
    let g = ground(true);
    let recorded = g.recorded.iter().find(|r| r.status == Status::Attached && r.mapped.is_some()).unwrap();
    let ours_here = g.views.iter().find(|v| match v {
        View::Seen(seen) => seen.mark == Some(g.mark) && seen.attached.is_some_and(|a| a.vm == g.host),
        _ => false,
    });
    for view in [&View::Unseen, ours_here.unwrap()] {
        let of_size = |size| {
            let c = g.candidates.iter().find(|c| c.len() == 1 && c[0].incarnation == g.same && c[0].size == size);
            settle(recorded, &view.cloud(), c.unwrap(), g.rules).status
        };
        assert_eq!(of_size(2 * GIB), Status::Attached, "{view:?}");
        assert_eq!(of_size(GIB / 2), Status::Conflict, "{view:?}");
    }
}

#[test]
fn an_imported_volume_is_nothing_but_unknown_missing_or_in_conflict_until_it_is_marked() {
    every(true, |g, recorded, view, candidates, _| {
        for tried in [Vec::new(), vec![3]] {
            for carries_host in [None, Some("/".to_owned())] {
                let unmarked = Unmarked { tried: tried.clone(), carries_host: carries_host.clone() };
                let mark = Mark { epoch: 0, ..g.mark };
                let status = match recorded.status {
                    s @ (Status::Missing | Status::Conflict) => s,
                    _ => Status::Unknown,
                };
                let recorded = Recorded { status, mapped: None, mark, unmarked: Some(unmarked), ..recorded.clone() };
                let found = settle(&recorded, &view.cloud(), candidates, g.rules);
                let told = format!("{recorded:?} {view:?}: {found:?}");
                assert!(matches!(found.status, Status::Unknown | Status::Missing | Status::Conflict), "{told}");
                assert!(found.device.is_none() && !found.drift && found.why.is_some(), "{told}");
                let free = match view {
                    View::Seen(seen) => {
                        carries_host.is_none()
                            && seen.mark.is_none_or(|m| m.record == mark.record && tried.contains(&m.epoch))
                    }
                    _ => false,
                };
                assert_eq!(found.markable, free, "{told}");
                assert_eq!(found.markable, found.status == Status::Unknown && matches!(view, View::Seen(_)), "{told}");
            }
        }
    });
}
