//! What a disk is known by: from its sysfs directory, and nothing else (rules D1 and D5).

use std::io;
use std::path::Path;

use crate::model::DiskIdentity;

/// Longest identity that is believed, in bytes; SCSI designators are at most 255.
const LONGEST: usize = 255;

/// The identity of the disk whose sysfs directory (`/sys/block/NAME`) this is.
///
/// Looked at, in this order, the first that yields clean text winning:
/// `serial` of a virtio-blk disk (named `vd*`; up to 20 bytes, no newline), `device/vpd_pg80`
/// (SCSI unit serial number), `device/serial` (NVMe controller), `device/vpd_pg83` (SCSI
/// designators), `wwid` and `device/wwid`. Empty, garbled or non-ASCII text is
/// [`DiskIdentity::None`]: such a disk is never a volume's. Loop devices keep their tag elsewhere.
///
/// Reading may block for as long as the device does (kernel fact 22).
///
/// # Errors
/// An attribute that is there and cannot be read.
pub fn read(dir: &Path) -> io::Result<DiskIdentity> {
    let virtio = dir.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"vd"));
    if virtio {
        let serial = attribute(&dir.join("serial"))?.and_then(|b| clean(&b));
        return Ok(serial.map_or(DiskIdentity::None, DiskIdentity::VirtioSerial));
    }
    if let Some(serial) = attribute(&dir.join("device/vpd_pg80"))?.and_then(|page| unit_serial(&page)) {
        return Ok(DiskIdentity::Serial(serial));
    }
    if let Some(serial) = attribute(&dir.join("device/serial"))?.and_then(|b| clean(&b)) {
        return Ok(DiskIdentity::Serial(serial));
    }
    if let Some(id) = attribute(&dir.join("device/vpd_pg83"))?.and_then(|page| designator(&page)) {
        return Ok(DiskIdentity::Serial(id));
    }
    for name in ["wwid", "device/wwid"] {
        if let Some(id) = attribute(&dir.join(name))?.and_then(|b| clean(&b)) {
            // A kind without a number tells nothing.
            let number = without_kind(&id).trim_ascii();
            if !number.is_empty() {
                return Ok(DiskIdentity::Serial(number.to_owned()));
            }
        }
    }
    Ok(DiskIdentity::None)
}

/// The attribute's bytes; `None` if the disk has no such attribute, or the device none to give.
fn attribute(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::EINVAL)) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Text without the padding that transports put around it; `None` unless all of it is printable ASCII.
fn clean(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().rposition(|b| *b != 0).map_or(0, |n| n + 1);
    let text = bytes[..end].trim_ascii();
    let printable = text.iter().all(|b| b.is_ascii_graphic() || *b == b' ');
    if text.is_empty() || text.len() > LONGEST || !printable {
        return None;
    }
    Some(text.iter().map(|b| char::from(*b)).collect())
}

/// The payload of a SCSI vital product data page: 4 bytes of header, the last two its length.
fn page(bytes: &[u8], code: u8) -> Option<&[u8]> {
    let (header, rest) = bytes.split_at_checked(4)?;
    let length = usize::from(header[2]) << 8 | usize::from(header[3]);
    if header[1] != code { None } else { rest.get(..length) }
}

/// SPC-4, 7.8.16: the unit serial number page.
fn unit_serial(bytes: &[u8]) -> Option<String> {
    clean(page(bytes, 0x80)?)
}

/// SPC-4, 7.8.6: the first designator of the logical unit itself (association 0) that can be
/// told as text: T10 vendor id without the vendor's 8 bytes, EUI-64, NAA or UUID in hex.
fn designator(bytes: &[u8]) -> Option<String> {
    let mut rest = page(bytes, 0x83)?;
    while let Some((header, after)) = rest.split_at_checked(4) {
        let (body, next) = after.split_at_checked(usize::from(header[3]))?;
        rest = next;
        let of_the_unit = header[1] >> 4 & 3 == 0;
        let text = match (header[0] & 0xf, header[1] & 0xf) {
            (2 | 3, 1) => body.get(8..).and_then(clean),
            (1, 2 | 3) if !body.is_empty() => Some(hex(body)),
            (1, 10) => body.get(2..18).map(hex),
            _ => None,
        };
        if let (true, Some(text)) = (of_the_unit, text) {
            return Some(text);
        }
    }
    None
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// A WWID without the word that says which kind of number it is.
fn without_kind(wwid: &str) -> &str {
    ["uuid.", "eui.", "naa."].iter().find_map(|kind| wwid.strip_prefix(kind)).unwrap_or(wwid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::VolumeId;
    use proptest::prelude::*;

    const UUID: &str = "2aff4799-1111-4222-8333-444455556666";

    struct Tree(tempfile::TempDir, &'static str);

    impl Tree {
        fn new(disk: &'static str) -> Self {
            Tree(tempfile::tempdir().unwrap(), disk)
        }

        fn with(self, attribute: &str, bytes: &[u8]) -> Self {
            let path = self.0.path().join(self.1).join(attribute);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
            self
        }

        fn identity(&self) -> DiskIdentity {
            read(&self.0.path().join(self.1)).unwrap()
        }
    }

    fn pg80(text: &[u8]) -> Vec<u8> {
        [&[0, 0x80, 0, text.len() as u8], text].concat()
    }

    #[test]
    fn a_virtio_serial_is_its_20_bytes_without_a_newline() {
        let disk = Tree::new("vdb").with("serial", b"2aff4799111142228333");
        assert_eq!(disk.identity(), DiskIdentity::VirtioSerial("2aff4799111142228333".into()));
        assert!(disk.identity().names(VolumeId::parse(UUID).unwrap()));
    }

    #[test]
    fn an_empty_garbled_or_foreign_serial_names_nobody() {
        for bytes in [&b""[..], b"\n", b"    ", b"\0\0\0", b"2aff\x07", b"2aff\xff\xfe", "2äff".as_bytes(), b"a\0b"] {
            assert_eq!(Tree::new("vdb").with("serial", bytes).identity(), DiskIdentity::None, "{bytes:?}");
            assert_eq!(
                Tree::new("sda").with("device/vpd_pg80", &pg80(bytes)).identity(),
                DiskIdentity::None,
                "{bytes:?}"
            );
            assert_eq!(Tree::new("nvme0n1").with("device/serial", bytes).identity(), DiskIdentity::None, "{bytes:?}");
        }
        assert_eq!(Tree::new("vdb").with("size", b"1\n").identity(), DiskIdentity::None);
    }

    #[test]
    fn a_scsi_unit_serial_is_read_without_header_and_padding() {
        let disk = Tree::new("sda").with("device/vpd_pg80", &pg80(b"  2aff4799111142228333  "));
        assert_eq!(disk.identity(), DiskIdentity::Serial("2aff4799111142228333".into()));
        for broken in [&b"\0\x80"[..], b"\0\x80\0\x20abc", b"\0\x83\0\x03abc"] {
            assert_eq!(Tree::new("sda").with("device/vpd_pg80", broken).identity(), DiskIdentity::None, "{broken:?}");
        }
    }

    #[test]
    fn scsi_designators_are_those_of_the_unit_not_of_the_port() {
        let port = [&[1, 0x13, 0, 8][..], &[0x50; 8]].concat();
        let unit = [&[2, 0x01, 0, 28][..], b"QEMU    ", b"2aff4799111142228333"].concat();
        let page = [&[0, 0x83, 0, (port.len() + unit.len()) as u8][..], &port, &unit].concat();
        let disk = Tree::new("sda").with("device/vpd_pg83", &page);
        assert_eq!(disk.identity(), DiskIdentity::Serial("2aff4799111142228333".into()));
        let only_port = [&[0, 0x83, 0, port.len() as u8][..], &port].concat();
        assert_eq!(Tree::new("sda").with("device/vpd_pg83", &only_port).identity(), DiskIdentity::None);
    }

    #[test]
    fn a_wwid_is_taken_last_and_a_uuid_in_it_names_its_volume() {
        let disk = Tree::new("nvme0n1").with("wwid", format!("uuid.{UUID}\n").as_bytes());
        assert!(disk.identity().names(VolumeId::parse(UUID).unwrap()));
        let disk = disk.with("device/serial", b"S4EVNX0M\n");
        assert_eq!(disk.identity(), DiskIdentity::Serial("S4EVNX0M".into()));
        let scsi = Tree::new("sdb").with("device/wwid", b"naa.600508b1001c0000\n");
        assert_eq!(scsi.identity(), DiskIdentity::Serial("600508b1001c0000".into()));
    }

    #[test]
    fn a_serial_that_cannot_be_read_is_an_error_and_not_an_empty_one() {
        let tree = tempfile::tempdir().unwrap();
        let disk = tree.path().join("vdb");
        std::fs::create_dir_all(disk.join("serial")).unwrap();
        assert!(read(&disk).is_err());
    }

    proptest! {
        #[test]
        fn no_page_however_hostile_panics_or_yields_control_characters(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let page83 = [&[0, 0x83, 0, bytes.len() as u8], &bytes[..]].concat();
            for text in [clean(&bytes), unit_serial(&bytes), designator(&bytes), designator(&page83)].into_iter().flatten() {
                prop_assert!(!text.is_empty() && text.bytes().all(|b| b == b' ' || b.is_ascii_graphic()));
            }
        }
    }
}
