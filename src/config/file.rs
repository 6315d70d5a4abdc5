//! The TOML file: its keys, and errors that name file and line.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::Visitor;

use super::ExportName;
use super::cloudstack::FileCloudStack;
use crate::model::VolumeId;

/// Where volumes come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Provider {
    /// Sparse files of this host, attached as loop devices.
    Loop,
    /// Volumes of an Apache CloudStack, attached to the VM that this host is.
    Cloudstack,
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Provider::Loop => "loop",
            Provider::Cloudstack => "cloudstack",
        })
    }
}

/// How a device's size is compared with the cloud's (rule D3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SizeCheck {
    /// Equal.
    Exact,
    /// The device may be larger: storage that rounds up.
    AtLeast,
}

impl fmt::Display for SizeCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SizeCheck::Exact => "exact",
            SizeCheck::AtLeast => "at-least",
        })
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileConfig {
    pub mountpoint: Option<PathBuf>,
    pub state_dir: Option<PathBuf>,
    pub provider: Option<Provider>,
    pub group: Option<String>,
    pub log: Option<String>,
    pub log_file: Option<PathBuf>,
    pub read_only: Option<bool>,
    pub reconcile_interval: Option<Within<1, 86_400>>,
    protect: Option<Vec<toml::Spanned<String>>>,
    /// `protect`, checked by [`parse`].
    #[serde(skip)]
    pub protected: Vec<VolumeId>,
    pub export_name: Option<Template>,
    pub size_check: Option<SizeCheck>,
    pub history: Option<Within<0, 1_000_000>>,
    #[serde(default, rename = "loop")]
    pub loop_provider: FileLoop,
    #[serde(default)]
    pub cloudstack: FileCloudStack,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileLoop {
    pub dir: Option<PathBuf>,
    pub trash_keep: Option<Within<0, 315_360_000>>,
    pub capacity: Option<Bytes>,
    pub most_disks: Option<Within<1, 1_048_576>>,
}

/// A whole number within bounds.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(try_from = "i64")]
pub(super) struct Within<const LEAST: u64, const MOST: u64>(pub u64);

impl<const LEAST: u64, const MOST: u64> TryFrom<i64> for Within<LEAST, MOST> {
    type Error = String;

    fn try_from(n: i64) -> Result<Self, String> {
        let inside = u64::try_from(n).ok().filter(|n| (LEAST..=MOST).contains(n));
        inside.map(Self).ok_or_else(|| format!("{n} is not within {LEAST} to {MOST}"))
    }
}

#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct Template(pub ExportName);

impl TryFrom<String> for Template {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        ExportName::parse(&text).map(Self)
    }
}

/// Bytes, as a number or as a text like "10G".
#[derive(Debug)]
pub(super) struct Bytes(pub u64);

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Either;
        impl Visitor<'_> for Either {
            type Value = Bytes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes, or a text like \"10G\"")
            }

            fn visit_i64<E: serde::de::Error>(self, n: i64) -> Result<Bytes, E> {
                match u64::try_from(n) {
                    Ok(n) if n > 0 => Ok(Bytes(n)),
                    _ => Err(E::custom(format!("{n} is no size: it must be above 0"))),
                }
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Bytes, E> {
                crate::command::size(text).map(Bytes).map_err(E::custom)
            }
        }
        from.deserialize_any(Either)
    }
}

/// Reads and checks one file; `Ok(None)` when there is none. The error is a sentence that names
/// the file, and the line where it is about one.
pub(super) fn read(path: &Path) -> Result<Option<FileConfig>, String> {
    match std::fs::read_to_string(path) {
        Ok(text) => parse(path, &text).map(Some),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(format!("{}: {e}", path.display())),
    }
}

fn parse(path: &Path, text: &str) -> Result<FileConfig, String> {
    let at = |span: Option<std::ops::Range<usize>>, message: String| match span.and_then(|s| text.get(..s.start)) {
        Some(before) => format!("{}:{}: {message}", path.display(), before.matches('\n').count() + 1),
        None => format!("{}: {message}", path.display()),
    };
    let mut config: FileConfig =
        toml::from_str(text).map_err(|e: toml::de::Error| at(e.span(), e.message().replace('\n', "; ")))?;
    // An error raised inside an array would carry the array's first line, not the element's.
    for id in config.protect.take().unwrap_or_default() {
        match VolumeId::parse(id.get_ref()) {
            Ok(volume) => config.protected.push(volume),
            Err(e) => return Err(at(Some(id.span()), e.to_string())),
        }
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(text: &str) -> String {
        match parse(Path::new("/x.toml"), text) {
            Err(words) => words,
            Ok(c) => panic!("{text:?} was taken as {c:?}"),
        }
    }

    #[test]
    fn a_fault_names_file_and_line() {
        for (text, line, word) in [
            ("\n\nmountpiont = \"/x\"\n", 3, "mountpiont"),
            ("log = \"info\"\n[loop]\n# x\ncapasity = 4\n", 4, "capasity"),
            ("[lop]\n", 1, "lop"),
            ("read_only = \"yes\"", 1, "boolean"),
            ("\nreconcile_interval = 0", 2, "1 to 86400"),
            ("reconcile_interval = 1.5", 1, "floating point"),
            ("protect = [\n \"2aff4799-1111-4222-8333-444455556666\",\n \"no\",\n]", 3, "lower-case UUID"),
            ("\n\nexport_name = \"{disk}\"", 3, "{uuid}"),
            ("size_check = \"atleast\"", 1, "at-least"),
            ("provider = \"cloud\"", 1, "loop"),
            ("[loop]\ncapacity = \"10g\"", 2, "K, M, G or T"),
            ("[loop]\ncapacity = -1", 2, "above 0"),
            ("[loop]\nmost_disks = 0", 2, "1 to"),
            ("[cloudstack]\nregion = \"x\"", 2, "region"),
            ("[cloudstack]\nendpoint = \"cloud.example\"", 2, "https://cloud.example/client/api"),
            ("[cloudstack]\n\nendpoint = \"https://me:word@cloud/client/api\"", 3, "without user"),
            ("[cloudstack]\nendpoint = \"https://cloud/client/api?x\"", 2, "plain address"),
            ("[cloudstack]\nendpoint = \"https:///client/api\"", 2, "plain address"),
            ("[cloudstack]\nsignature = \"md5\"", 2, "sha512"),
            ("[cloudstack]\nzone = \" \"", 2, "empty"),
            ("[cloudstack]\noffering = \"Custom\"", 2, "lower-case UUID"),
            ("[cloudstack]\nproject = \"2AFF4799-1111-4222-8333-444455556666\"", 2, "lower-case UUID"),
            ("[cloudstack]\nhost = \"i-2-3-VM\"", 2, "lower-case UUID"),
            ("[cloudstack]\nmost_disks = 0", 2, "1 to 256"),
            ("[cloudstack]\ntimeout = 2", 2, "3 to 600"),
            ("[cloudstack]\nrecoverable_for = -1", 2, "0 to"),
            ("[cloudstack]\ncredentials = 7", 2, "path"),
            ("history = -1", 1, "0 to 1000000"),
            ("log = \"a\"\nlog = \"b\"", 2, "duplicate"),
            ("a b", 1, "/x.toml"),
        ] {
            let words = fault(text);
            assert!(words.starts_with(&format!("/x.toml:{line}: ")), "{text:?}: {words}");
            assert!(words.contains(word), "{text:?}: {words}");
        }
    }

    #[test]
    fn every_key_is_taken() {
        let c = parse(
            Path::new("/x.toml"),
            r#"
            mountpoint = "/m"
            state_dir = "/s"
            provider = "loop"
            group = "g"
            log = "debug"
            log_file = "/l"
            read_only = true
            reconcile_interval = 5
            protect = ["2aff4799-1111-4222-8333-444455556666"]
            export_name = "x-{uuid}"
            size_check = "at-least"
            history = 7
            [loop]
            dir = "/d"
            trash_keep = 60
            capacity = "10G"
            most_disks = 9
            "#,
        )
        .unwrap();
        assert_eq!(c.loop_provider.capacity.unwrap().0, 10 << 30);
        assert_eq!(c.size_check, Some(SizeCheck::AtLeast));
        assert_eq!(c.reconcile_interval.unwrap().0, 5);
        assert_eq!(parse(Path::new("/x"), "[loop]\ncapacity = 5").unwrap().loop_provider.capacity.unwrap().0, 5);
    }
}
