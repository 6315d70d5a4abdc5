//! What makes a disk appear in, and vanish from, a VM.

use std::path::PathBuf;

/// What a disk is known by inside the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    /// A volume's id, 36 characters in lower case: the honest case.
    Volume(String),
    /// Any other text.
    Text(String),
    /// Nothing.
    Empty,
}

impl Identity {
    /// What KVM gives as serial: the first 20 hex digits of the id (5.1), at most 20 bytes of text.
    pub fn serial(&self) -> String {
        match self {
            Identity::Volume(id) => id.chars().filter(|c| *c != '-').take(20).collect(),
            Identity::Text(text) => text.chars().take(20).collect(),
            Identity::Empty => String::new(),
        }
    }

    /// What a loop device carries in `lo_file_name`, which takes 63 bytes.
    pub fn loop_tag(&self) -> String {
        match self {
            Identity::Volume(id) => format!("volfs:{id}"),
            Identity::Text(text) => text.clone(),
            Identity::Empty => String::new(),
        }
    }
}

/// One disk to be plugged.
#[derive(Debug, Clone)]
pub struct Plug {
    /// Names this plugging until it is pulled; never used twice. A volume may be plugged twice.
    pub key: u64,
    /// The volume's id.
    pub volume: String,
    /// The VM's id.
    pub vm: String,
    /// The cloud's device id: bookkeeping, not the guest's order.
    pub device_id: u32,
    /// What the guest is to know it by.
    pub identity: Identity,
    /// Bytes that the guest is to see; the file's size but for a fault.
    pub size: u64,
    /// The backing file, raw and sparse.
    pub path: PathBuf,
}

/// The kernel's or emulator's side of an attachment.
///
/// Called without any lock of the cloud, from the thread of the job; calls for one VM come one after
/// another. A refusal's text is that of libvirt's part in "Failed to attach volume V to VM W; TEXT".
pub trait Hypervisor: Send + Sync {
    /// Whether this VM's disks are real. For another VM the cloud only keeps its books.
    fn serves(&self, vm: &str) -> bool;

    /// Makes the disk appear.
    ///
    /// # Errors
    /// The text that the job fails with.
    fn plug(&self, disk: &Plug) -> Result<(), String>;

    /// Makes it go. A disk that is not there (any more) is success: "mark detached" (4.4).
    ///
    /// # Errors
    /// The text that the job fails with.
    fn unplug(&self, disk: &Plug) -> Result<(), String>;

    /// The backing file has a new size, `disk.size`.
    ///
    /// # Errors
    /// The text that the job fails with.
    fn resized(&self, disk: &Plug) -> Result<(), String>;

    /// The cloud goes: nothing plugged may stay behind.
    fn end(&self) {}
}

/// No VM's disks are real.
#[derive(Debug, Default, Clone, Copy)]
pub struct BooksOnly;

impl Hypervisor for BooksOnly {
    fn serves(&self, _vm: &str) -> bool {
        false
    }

    fn plug(&self, _disk: &Plug) -> Result<(), String> {
        Ok(())
    }

    fn unplug(&self, _disk: &Plug) -> Result<(), String> {
        Ok(())
    }

    fn resized(&self, _disk: &Plug) -> Result<(), String> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_serial_is_the_first_20_digits_of_the_id() {
        let id = Identity::Volume("3c9a6f0e-5b7d-4e1a-8f22-0a1b2c3d4e5f".into());
        assert_eq!(id.serial(), "3c9a6f0e5b7d4e1a8f22");
        assert_eq!(id.loop_tag(), "volfs:3c9a6f0e-5b7d-4e1a-8f22-0a1b2c3d4e5f");
        assert_eq!(Identity::Empty.serial(), "");
    }
}
