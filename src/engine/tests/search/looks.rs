//! L2, of the pure function alone: looking again finds the same, and what was seen before a full look
//! makes no difference to what it finds. Every combination of what record, cloud and kernel can say.

use super::state::{HOST, Map, OTHER, OURS, SIZE, THEIRS, VOLUME};
use crate::cloud::{Attachment, CloudVolume};
use crate::engine::reconcile::{CloudView, Finding, Recorded, Rules, settle};
use crate::model::{DevNo, Disk, DiskIdentity, Status};

const SETTLED: [Status; 7] = [
    Status::Detached,
    Status::Attached,
    Status::Remote,
    Status::Lost,
    Status::Missing,
    Status::Unknown,
    Status::Conflict,
];

fn disk(map: Map, size: u64) -> Disk {
    let incarnation = map.incarnation().unwrap();
    let name = format!("vd{}", incarnation.diskseq).into();
    let identity = DiskIdentity::VirtioSerial(VOLUME.0.simple().to_string()[..20].into());
    let minor = u32::try_from(incarnation.diskseq).unwrap();
    Disk { name, dev: DevNo { major: 252, minor }, incarnation, size, identity }
}

fn kernels(sizes: &[u64]) -> Vec<Vec<Disk>> {
    let mut all = vec![vec![], vec![disk(Map::This, SIZE), disk(Map::Gone, SIZE)]];
    all.extend(sizes.iter().flat_map(|size| [vec![disk(Map::This, *size)], vec![disk(Map::Gone, *size)]]));
    all
}

fn records() -> Vec<Recorded> {
    let mut all = Vec::new();
    for status in SETTLED {
        for vm in [None, Some(HOST), Some(OTHER)] {
            for mapped in [Map::None, Map::This, Map::Gone] {
                all.push(Recorded { status, vm, mapped: mapped.incarnation(), size: SIZE, mark: OURS, unmarked: None });
            }
        }
    }
    all
}

fn clouds(sizes: &[u64]) -> Vec<CloudVolume> {
    let mut all = Vec::new();
    for mark in [Some(OURS), Some(THEIRS), None] {
        for vm in [None, Some(HOST), Some(OTHER)] {
            for size in sizes {
                all.push(CloudVolume {
                    id: VOLUME,
                    name: String::new(),
                    size: *size,
                    state: String::new(),
                    attached: vm.map(|vm| Attachment { vm, device_id: None }),
                    mark,
                    carries_host: None,
                    pending: None,
                });
            }
        }
    }
    all
}

fn views(clouds: &[CloudVolume]) -> Vec<CloudView<'_>> {
    let mut all = vec![
        CloudView::Unseen,
        CloudView::Stale,
        CloudView::Absent { confirmed: false },
        CloudView::Absent { confirmed: true },
    ];
    all.extend(clouds.iter().map(CloudView::Seen));
    all
}

/// What the engine compares with next, after it has shown a finding.
fn after(recorded: &Recorded, view: &CloudView<'_>, finding: &Finding) -> Recorded {
    let size = match view {
        CloudView::Seen(seen) => seen.size,
        _ => recorded.size,
    };
    let mapped = finding.device.as_ref().map(|d| d.incarnation);
    Recorded { status: finding.status, vm: finding.vm, mapped, size, mark: recorded.mark, unmarked: None }
}

fn place(finding: &Finding) -> (Status, Option<crate::model::VmId>, Option<&Disk>) {
    (finding.status, finding.vm, finding.device.as_ref())
}

#[test]
fn looking_again_finds_the_same_and_calls_it_no_drift() {
    let sizes = [SIZE, 2 * SIZE, SIZE / 2];
    let clouds = clouds(&sizes);
    let mut count = 0;
    for exact_size in [true, false] {
        let rules = Rules { host: HOST, exact_size };
        for recorded in records() {
            for view in views(&clouds) {
                for disks in kernels(&sizes) {
                    let first = settle(&recorded, &view, &disks, rules);
                    let second = settle(&after(&recorded, &view, &first), &view, &disks, rules);
                    assert_eq!(place(&first), place(&second), "{recorded:?} {view:?} {disks:?}");
                    assert!(!second.drift, "{recorded:?} {view:?} {disks:?}");
                    count += 1;
                }
            }
        }
    }
    assert_eq!(count, 2 * 63 * 31 * 8, "the combinations are not those that are documented");
}

#[test]
fn what_was_seen_before_makes_no_difference_to_what_a_full_look_finds() {
    // Of one size: a disk that was verified may have grown since, which only its history tells (rule D3).
    let sizes = [SIZE];
    let clouds = clouds(&sizes);
    let rules = Rules { host: HOST, exact_size: true };
    let mut count = 0;
    for recorded in records() {
        for disks in kernels(&sizes) {
            for last in &clouds {
                let last = CloudView::Seen(last);
                let straight = settle(&recorded, &last, &disks, rules);
                for before in views(&clouds) {
                    // The kernel had other devices then, too.
                    for then in kernels(&sizes) {
                        let first = settle(&recorded, &before, &then, rules);
                        let around = settle(&after(&recorded, &before, &first), &last, &disks, rules);
                        assert_eq!(
                            place(&straight),
                            place(&around),
                            "{recorded:?} {before:?} {then:?} {last:?} {disks:?}"
                        );
                        count += 1;
                    }
                }
            }
        }
    }
    assert_eq!(count, 63 * 4 * 9 * 13 * 4, "the combinations are not those that are documented");
}
