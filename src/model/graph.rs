//! The documented graph of statuses (rows V1 to V8 and X1 to X10 of the contract).

use super::Status;

/// Whether a volume's status may go from one to the other in one step, while volfs runs.
pub fn edge_is_documented(from: Status, to: Status) -> bool {
    use Status::*;
    let settled = |s: Status| !s.in_flight();
    match (from, to) {
        // V3 to V8: what is observed corrects where a volume is; V6 has its own check.
        (from, to) if settled(from) && settled(to) => true,
        // X1, X2: begun where it is detached, or lost and waited for. R: after a crash it is unknown, and taken over.
        (Detached | Lost | Unknown, Attaching) => true,
        // X3, X4.
        (Attached | Lost | Remote | Unknown, Detaching) => true,
        // X5.
        (Detached | Attached | Unknown, Resizing | Snapshotting) => true,
        // X6.
        (Detached | Unknown, Reverting) => true,
        // X7, X10: destroy has its volumes from the moment it begins.
        (Detached | Missing | Attached | Unknown, Deleting) => true,
        // X10: its parts.
        (Deleting, Detaching) | (Detaching, Deleting) => true,
        // Ends: done, or refused and as before, or in doubt; and what a look in the same moment found.
        (Attaching, Attached | Remote | Detached | Lost | Unknown) => true,
        (Detaching, Detached | Attached | Remote | Lost | Unknown) => true,
        (Resizing | Snapshotting, Detached | Attached | Unknown) => true,
        (Reverting, Detached | Unknown) => true,
        (Deleting, Detached | Attached | Missing | Unknown) => true,
        _ => false,
    }
}
