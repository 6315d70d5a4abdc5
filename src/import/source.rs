//! The dump's bytes: a file or standard input, plain or gzip, of as many members as there are.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use flate2::bufread::MultiGzDecoder;

/// Bytes asked for at once.
const CHUNK: usize = 1 << 16;

/// What other packers begin with; a dump begins with none of these.
const PACKED: [(&[u8], &str); 5] = [
    (b"\x28\xb5\x2f\xfd", "zstd -dc"),
    (b"\xfd7zXZ\0", "xz -dc"),
    (b"BZh", "bzip2 -dc"),
    (b"PK\x03\x04", "unzip -p"),
    (b"\xff\xfe", "iconv -f UTF-16 -t UTF-8"),
];

/// A dump to read, unpacked.
pub struct Source {
    /// As its errors call it.
    pub name: String,
    input: Box<dyn Read>,
}

impl Source {
    /// Opens `path`; `-` is standard input.
    ///
    /// # Errors
    /// A sentence: it cannot be read, is empty, or is packed by something else than gzip.
    pub fn open(path: &Path) -> Result<Self, String> {
        if path.as_os_str() == "-" {
            return Self::unpacked("standard input".into(), io::stdin());
        }
        let name = path.display().to_string();
        match File::open(path) {
            Ok(file) => Self::unpacked(name, file),
            Err(e) => Err(format!("{name}: {e}")),
        }
    }

    /// Looks at the first bytes to see how they are packed.
    ///
    /// # Errors
    /// As [`Source::open`].
    pub fn unpacked(name: String, input: impl Read + 'static) -> Result<Self, String> {
        let mut input = BufReader::with_capacity(CHUNK, input);
        let first = match input.fill_buf() {
            Ok([]) => return Err(format!("{name}: it is empty")),
            Ok(first) => first,
            Err(e) => return Err(format!("{name}: {e}")),
        };
        if let Some((_, program)) = PACKED.iter().find(|(magic, _)| first.starts_with(magic)) {
            return Err(format!("{name}: only plain files and gzip are read: `{program} … | volfs import -`"));
        }
        // A pipe may have given one byte so far, and no text begins with this one.
        let gzip = first[0] == 0x1f;
        let input: Box<dyn Read> = if gzip { Box::new(MultiGzDecoder::new(input)) } else { Box::new(input) };
        Ok(Source { name, input })
    }
}

impl Read for Source {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.input.read(into)
    }
}
