//! What a refusal of CloudStack means. Pure: number and words in, kind out.
//!
//! The number decides little: 431 is "parameter error" and most conflicts of state alike, 530 is
//! anything. So the words decide, as the server's source has them (reference: cloudstack-api.md,
//! tables of 2.3, 2.4, 2.5, 2.8 and section 6); what no row names is [`Refusal::Other`].

use super::super::{CloudError, Refusal};

/// A sentence of the server, and what it means. The first row whose words are in the text wins.
const ROWS: &[(&str, Refusal)] = &[
    // Full, in ways that no waiting mends.
    ("maximum number of data disks", Refusal::Capacity),
    ("No more available PCI slots", Refusal::Capacity),
    ("All device Ids are used", Refusal::Capacity),
    ("Failed to find a primary storage", Refusal::Capacity),
    ("Unable to find suitable primary storage", Refusal::Capacity),
    ("Unable to find storage pool", Refusal::Capacity),
    // Passes by itself.
    ("There is other active snapshot tasks", Refusal::Passing),
    ("There is other active vm snapshot tasks", Refusal::Passing),
    ("snapshot operations in progress", Refusal::Passing),
    ("unbacked up snapshot", Refusal::Passing),
    ("already in the process of unplug", Refusal::Passing),
    ("Could not detach volume after sending the command", Refusal::Passing),
    ("either running or stopped", Refusal::Passing),
    ("Volume state must be in Allocated, Ready or in Uploaded state", Refusal::Passing),
    ("It should be in Ready or Allocated state", Refusal::Passing),
    ("please retry after", Refusal::Passing),
    // Another state than the call needs.
    ("not attached to any VM", Refusal::Conflict),
    ("already attached to a VM", Refusal::Conflict),
    ("is used by vol", Refusal::Conflict),
    ("already has root volume attached", Refusal::Conflict),
    ("delete protection", Refusal::Conflict),
    ("not in the shutdown state", Refusal::Conflict),
    // Nothing of that name.
    ("Unable to find volume with ID", Refusal::NoVolume),
    ("Please specify a valid User VM", Refusal::NoVm),
];

/// The kind of a refusal: `code` is CloudStack's error number, `cs` its `cserrorcode`, `text` its words.
pub(super) fn kind(code: u16, cs: Option<u32>, text: &str) -> Refusal {
    if let Some((_, why)) = ROWS.iter().find(|(words, _)| text.contains(words)) {
        return why.clone();
    }
    if unknown_entity(code, text) {
        return match parameter(text) {
            Some("virtualmachineid") => Refusal::NoVm,
            Some("id" | "volumeid" | "resourceids") => Refusal::NoVolume,
            _ => Refusal::Other,
        };
    }
    match (code, cs) {
        // 4370 is ResourceAllocation: over a limit of the account, the project or the domain.
        (535, _) | (_, Some(4370)) => Refusal::Quota,
        (533, _) => Refusal::Capacity,
        (429 | 503 | 534, _) => Refusal::Passing,
        _ => Refusal::Other,
    }
}

/// Whether the server says that it never knew an id (section 2: "due to incorrect long value format,
/// or entity does not exist").
pub(super) fn unknown_entity(code: u16, text: &str) -> bool {
    code == 431 && text.contains("entity does not exist")
}

/// The parameter that an "Invalid parameter NAME value=…" is about.
fn parameter(text: &str) -> Option<&str> {
    text.split_once("Invalid parameter ")?.1.split_once(' ').map(|(name, _)| name)
}

/// What to do about a refusal that no waiting mends, for an operator.
fn way_out(text: &str) -> Option<&'static str> {
    const HINTS: &[(&str, &str)] = &[
        ("does not have VM snapshots", "delete the VM's snapshots (not its volumes' snapshots) first"),
        ("does not have any backups", "take the VM out of its backup offering first"),
        ("a VM that has backups", "take the VM out of its backup offering first"),
        (
            "duplicated",
            "the guest never released an earlier disk with that target: stop and start the VM, or have an operator \
             remove the disk",
        ),
        ("No more available PCI slots", "use virtio-scsi, or attach while the VM is stopped"),
        ("delete protection", "an operator has to switch its delete protection off"),
    ];
    HINTS.iter().find(|(words, _)| text.contains(words)).map(|(_, hint)| *hint)
}

/// The cloud's no, with its number and words, and what to do where that is known.
pub(super) fn refused(code: u16, cs: Option<u32>, text: &str) -> CloudError {
    let text = text.trim();
    let said = if text.is_empty() { "no words" } else { text };
    let number = cs.map_or_else(|| code.to_string(), |cs| format!("{code}/{cs}"));
    let hint = way_out(text).map(|hint| format!("; {hint}")).unwrap_or_default();
    CloudError::Refused { why: kind(code, cs, text), words: format!("CloudStack says {number}: {said}{hint}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quota_a_full_host_and_a_missing_object_are_told_apart() {
        let quota = "Maximum amount of resources of Type = 'volume' for Account is exceeded";
        assert_eq!(kind(535, Some(4370), quota), Refusal::Quota);
        assert_eq!(kind(533, None, "insufficient capacity"), Refusal::Capacity);
        let full = "The specified VM already has the maximum number of data disks (6) attached. Please specify another";
        assert_eq!(kind(431, Some(4350), full), Refusal::Capacity);
        let never = "Unable to execute API command attachvolume due to invalid value. Invalid parameter id \
                     value=3c9a6f0e-5b7d-4e1a-8f22-0a1b2c3d4e5f due to incorrect long value format, or entity does \
                     not exist or due to incorrect parameter annotation for the field in api cmd class.";
        assert_eq!(kind(431, None, never), Refusal::NoVolume);
        assert_eq!(kind(431, None, &never.replace("parameter id", "parameter virtualmachineid")), Refusal::NoVm);
        assert_eq!(kind(431, None, &never.replace("parameter id", "parameter zoneid")), Refusal::Other);
        assert_eq!(kind(431, Some(4350), "Unable to find volume with ID: 17"), Refusal::NoVolume);
    }

    #[test]
    fn what_passes_by_itself_is_tried_again_and_a_vm_snapshot_is_not() {
        for passing in [
            "There is other active snapshot tasks on the instance to which the volume is attached, please try again later",
            "Failed to detach volume V from VM W; Could not detach volume after sending the command and waiting for \
             [10000] milliseconds.",
            "Failed to detach volume V from VM W; device vdb is already in the process of unplug",
            "Please specify a VM that is either running or stopped.",
        ] {
            assert_eq!(kind(530, None, passing), Refusal::Passing, "{passing}");
        }
        assert_eq!(kind(503, None, "in maintenance"), Refusal::Passing);
        let snapshots = "Unable to attach volume to VM i-2-3, please specify a VM that does not have VM snapshots";
        assert_eq!(kind(431, Some(4350), snapshots), Refusal::Other);
        let CloudError::Refused { words, .. } = refused(431, Some(4350), snapshots) else { panic!() };
        assert!(words.starts_with("CloudStack says 431/4350: Unable"), "{words}");
        assert!(words.ends_with("delete the VM's snapshots (not its volumes' snapshots) first"), "{words}");
    }

    #[test]
    fn a_state_conflict_is_one_whatever_its_number() {
        for code in [431, 530] {
            assert_eq!(kind(code, None, "This volume is already attached to a VM."), Refusal::Conflict);
        }
        assert_eq!(kind(431, None, "Please specify a volume that is not attached to any VM."), Refusal::Conflict);
        assert_eq!(kind(530, None, ""), Refusal::Other);
        assert_eq!(kind(531, None, "Acct[x] does not have permission to operate with resource"), Refusal::Other);
    }
}
