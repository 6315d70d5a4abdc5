//! Flags, environment, the TOML file and defaults, in that order, as one validated [`Config`].

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser};

use crate::model::VolumeId;

mod cloudstack;
mod file;

pub use cloudstack::{CloudStackConfig, SignatureHash};
pub use file::{Provider, SizeCheck};

/// Where the tree is mounted when nothing says otherwise.
pub const DEFAULT_MOUNTPOINT: &str = "/run/volfs";
/// Where the record is when nothing says otherwise.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/volfs";
/// The configuration file that is read when it exists and none was named.
pub const DEFAULT_CONFIG_FILE: &str = "/etc/volfs/config.toml";
/// The group of writable files when it exists and none was named.
pub const DEFAULT_GROUP: &str = "volfs";

/// Where `mount --background` logs when nothing says otherwise.
pub const DEFAULT_BACKGROUND_LOG: &str = "/var/log/volfs.log";

const GROUP_FILE: &str = "/etc/group";

/// Why a command cannot go on, as a sentence for whoever started it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Problem(pub String);

impl Problem {
    /// `what: error`.
    pub fn with(what: impl fmt::Display, error: impl fmt::Display) -> Self {
        Problem(format!("{what}: {error}"))
    }
}

/// volfs serves the volumes of this host as a filesystem.
///
/// Options come from flags, then VOLFS_* variables, then the configuration file, then defaults.
#[derive(Debug, Parser)]
#[command(name = "volfs", version, max_term_width = 100)]
pub struct Cli {
    /// Options that every subcommand takes.
    #[command(flatten)]
    pub options: Options,
    /// What to do.
    #[command(subcommand)]
    pub command: Subcommand,
}

/// Options of all subcommands.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Options {
    /// Directory of the record [default: /var/lib/volfs].
    #[arg(long, global = true, value_name = "DIR", env = "VOLFS_STATE_DIR")]
    pub state_dir: Option<PathBuf>,
    /// Where volumes come from [default: loop].
    #[arg(long, global = true, value_enum, env = "VOLFS_PROVIDER")]
    pub provider: Option<Provider>,
    /// Group that may write to control files [default: volfs where it exists, else root].
    #[arg(long, global = true, value_name = "NAME", env = "VOLFS_GROUP")]
    pub group: Option<String>,
    /// What to log, e.g. info or volfs=debug [default: info].
    #[arg(long, global = true, value_name = "FILTER", env = "VOLFS_LOG")]
    pub log: Option<String>,
    /// Where to log instead of standard error [default with --background: /var/log/volfs.log].
    #[arg(long, global = true, value_name = "FILE", env = "VOLFS_LOG_FILE")]
    pub log_file: Option<PathBuf>,
    /// Configuration file; must exist when it is named [default: /etc/volfs/config.toml].
    #[arg(long, global = true, value_name = "FILE", env = "VOLFS_CONFIG")]
    pub config: Option<PathBuf>,
    /// Show everything, change nothing: every changing command answers EROFS.
    #[arg(
        long, global = true, value_name = "BOOL", env = "VOLFS_READ_ONLY", num_args = 0..=1, require_equals = true,
        default_missing_value = "true", value_parser = clap::builder::BoolishValueParser::new()
    )]
    pub read_only: Option<bool>,
}

/// The subcommands.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum Subcommand {
    /// Serve the tree, in the foreground.
    Mount {
        /// Where [default: /run/volfs].
        #[arg(env = "VOLFS_MOUNTPOINT")]
        mountpoint: Option<PathBuf>,
        /// Return when the tree answers, and go on in the background.
        #[arg(long)]
        background: bool,
        /// No keeper: the mount ends when the daemon dies, or the service manager starts the next one.
        #[arg(long)]
        no_keeper: bool,
        /// Set by `--background` for the process it starts: standard output is the way back to it.
        #[arg(long, hide = true)]
        background_child: bool,
        /// Set by the keeper for the daemon it starts: standard input is the way back to it.
        #[arg(long, hide = true)]
        kept: bool,
    },
    /// Take the tree away: the daemon behind it ends, volumes stay as they are.
    Unmount {
        /// Where [default: /run/volfs].
        #[arg(env = "VOLFS_MOUNTPOINT")]
        mountpoint: Option<PathBuf>,
    },
    /// Put the installed program in place of the running daemon; no caller notices.
    Upgrade {
        /// Where [default: /run/volfs].
        #[arg(env = "VOLFS_MOUNTPOINT")]
        mountpoint: Option<PathBuf>,
    },
    /// Run the main job for real in a temporary place, showing each command; leaves nothing behind.
    Demo,
    /// Say whose a record is that was restored, moved or cloned; no volfs may run with it.
    #[command(group = clap::ArgGroup::new("way").required(true).args(["this_host", "new"]))]
    Adopt {
        /// It goes on with its volumes here, and no other volfs does.
        #[arg(long)]
        this_host: bool,
        /// Another one goes on with them: this one becomes a record of its own that owns nothing.
        #[arg(long)]
        new: bool,
    },
    /// Write the record as it is now into a new file, also while volfs runs.
    Backup {
        /// The file to make.
        file: PathBuf,
    },
    /// Put a backup in place of the record, which is kept aside; `adopt` comes next.
    Restore {
        /// The file that `backup` made.
        file: PathBuf,
    },
    /// Make jobs and disks of an empty record from the marks that the volumes carry.
    Rebuild {
        /// Whose marks, where volumes carry those of several records.
        #[arg(long, value_name = "RECORD")]
        record: Option<String>,
    },
    /// Take jobs and volumes over from a dump of the database of the daemon before volfs.
    Import {
        /// What mysqldump or mariadb-dump made, plain or gzip; `-`: standard input.
        dump: PathBuf,
        /// Say what would be done, write nothing.
        #[arg(long)]
        dry_run: bool,
        /// Print the report as JSON.
        #[arg(long)]
        json: bool,
        /// What makes a job: a replication job, or a VM's context.
        #[arg(long, value_enum, value_name = "WHAT", default_value = "job")]
        job_by: JobBy,
        /// The dump is whole, though it has no comments that would say so.
        #[arg(long)]
        whole: bool,
        /// Which database, where the dump holds several.
        #[arg(long, value_name = "NAME")]
        database: Option<String>,
    },
    /// Show what would be used and try each part; changes nothing.
    Check {
        /// Where the tree would be [default: /run/volfs].
        #[arg(env = "VOLFS_MOUNTPOINT")]
        mountpoint: Option<PathBuf>,
    },
}

/// What makes a job of an import.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum JobBy {
    /// A row of `replication_jobs`.
    Job,
    /// A row of `vm_replication_contexts`.
    Context,
}

impl Subcommand {
    fn mountpoint(&self) -> Option<&Path> {
        match self {
            Subcommand::Mount { mountpoint, .. }
            | Subcommand::Unmount { mountpoint }
            | Subcommand::Upgrade { mountpoint }
            | Subcommand::Check { mountpoint } => mountpoint.as_deref(),
            Subcommand::Demo
            | Subcommand::Adopt { .. }
            | Subcommand::Backup { .. }
            | Subcommand::Restore { .. }
            | Subcommand::Rebuild { .. }
            | Subcommand::Import { .. } => None,
        }
    }
}

/// Who said a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A flag or argument.
    Flag,
    /// A `VOLFS_*` variable.
    Environment,
    /// The configuration file.
    File(PathBuf),
    /// Nobody.
    Default,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Flag => f.write_str("command line"),
            Source::Environment => f.write_str("environment"),
            Source::File(path) => write!(f, "{}", path.display()),
            Source::Default => f.write_str("default"),
        }
    }
}

/// The group of files that a group may write or open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// Its name, or its number where it was given so.
    pub name: String,
    /// Its id.
    pub gid: u32,
}

/// How exports are named: a text that holds `{uuid}` once, so that no two volumes can have one
/// name, and makes a file name of printable ASCII.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportName(String);

impl ExportName {
    /// Checks the template; the error is a sentence.
    pub fn parse(template: &str) -> Result<Self, String> {
        const LONGEST: usize = 200;
        let bad = |why: &str| Err(format!("export_name {template:?} {why}"));
        let Some((before, after)) = template.split_once("{uuid}") else {
            return bad("must hold {uuid}: names would not be unique");
        };
        let plain = |b: u8| b.is_ascii_graphic() && !matches!(b, b'/' | b'{' | b'}');
        if !before.bytes().chain(after.bytes()).all(plain) {
            return bad("may hold {uuid} once, and around it printable ASCII without blanks, slashes and braces");
        }
        if before.starts_with('.') {
            return bad("must not start with a dot");
        }
        if template.len() > LONGEST {
            return bad("is longer than 200 bytes");
        }
        Ok(Self(template.to_owned()))
    }

    /// The template as written.
    pub fn template(&self) -> &str {
        &self.0
    }
}

/// Options of the loop provider.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoopConfig {
    /// Directory of volume files and their metadata.
    pub dir: PathBuf,
    /// How long a deleted volume can be recovered.
    pub trash_keep: Duration,
    /// Bytes that all volumes together may have; `None`: what the filesystem below holds.
    pub capacity: Option<u64>,
    /// Most volumes attached here at once.
    pub most_disks: u32,
}

/// One value in use and who said it, for `volfs check`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// Its name in the configuration file.
    pub name: &'static str,
    /// The value, as text.
    pub value: String,
    /// Who said it.
    pub source: Source,
}

/// Everything that can be chosen, checked and complete. Paths are absolute.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where the tree is mounted.
    pub mountpoint: PathBuf,
    /// Directory of the record.
    pub state_dir: PathBuf,
    /// Where volumes come from.
    pub provider: Provider,
    /// Group of `control`, `block` and the like.
    pub group: Group,
    /// Log filter in the syntax of `tracing_subscriber::EnvFilter`.
    pub log: String,
    /// Log file; `None`: standard error.
    pub log_file: Option<PathBuf>,
    /// Every changing command answers EROFS.
    pub read_only: bool,
    /// How often record, cloud and kernel are compared.
    pub reconcile_interval: Duration,
    /// Volumes that cannot be claimed.
    pub protect: Vec<VolumeId>,
    /// Names below `exports/`.
    pub export_name: ExportName,
    /// How a device's size is compared with the cloud's.
    pub size_check: SizeCheck,
    /// Ended operations kept for `history` and `operations/`.
    pub history: usize,
    /// The loop provider's options.
    pub loop_provider: LoopConfig,
    /// The CloudStack provider's options.
    pub cloudstack: CloudStackConfig,
    /// The configuration file that was read, if one was.
    pub file: Option<PathBuf>,
    /// All of the above with who said it.
    pub settings: Vec<Setting>,
}

impl Cli {
    /// Parses the command line and environment; ends the process with clap's own words where they
    /// are wrong, or help is asked for.
    pub fn from_process() -> (Self, Config) {
        let matches = Self::command().get_matches();
        match Self::finish(&matches) {
            Ok(Ok(found)) => found,
            Ok(Err(problem)) => {
                eprintln!("volfs: {problem}");
                std::process::exit(1)
            }
            Err(usage) => usage.exit(),
        }
    }

    /// As [`Cli::from_process`] for given arguments, the program's name first.
    pub fn from_args(args: impl IntoIterator<Item = OsString>) -> Result<(Self, Config), Problem> {
        let words = |e: clap::Error| Problem(e.to_string().trim_end().to_owned());
        let matches = Self::command().try_get_matches_from(args).map_err(words)?;
        Self::finish(&matches).map_err(words)?
    }

    fn finish(matches: &ArgMatches) -> Result<Result<(Self, Config), Problem>, clap::Error> {
        let cli = Self::from_arg_matches(matches)?;
        let below = matches.subcommand().map(|(_, m)| m);
        let config = Config::build(&cli.options, cli.command.mountpoint(), |name| {
            let source = |m: &ArgMatches| m.try_contains_id(name).ok().and_then(|_| m.value_source(name));
            match below.and_then(source).or_else(|| source(matches)) {
                Some(ValueSource::EnvVariable) => Source::Environment,
                _ => Source::Flag,
            }
        });
        Ok(config.map(|config| (cli, config)))
    }
}

/// Picks values in order of precedence and remembers who said each.
struct Picker<'a> {
    file: Option<&'a Path>,
    said_by: &'a dyn Fn(&str) -> Source,
    settings: BTreeMap<usize, Setting>,
}

impl Picker<'_> {
    fn pick<T>(
        &mut self,
        name: &'static str,
        flag: Option<T>,
        file: Option<T>,
        default: T,
        show: fn(&T) -> String,
    ) -> T {
        let (value, source) = match (flag, file, self.file) {
            (Some(value), _, _) => (value, (self.said_by)(name)),
            (None, Some(value), Some(path)) => (value, Source::File(path.to_owned())),
            (None, Some(value), None) => (value, Source::Default),
            (None, None, _) => (default, Source::Default),
        };
        let order = self.settings.len();
        self.settings.insert(order, Setting { name, value: show(&value), source });
        value
    }
}

fn path_text(path: &Path) -> String {
    path.display().to_string()
}

impl Config {
    /// Puts flags and the file together. `said_by` tells for a name given by flag or variable which.
    pub fn build(
        options: &Options,
        mountpoint: Option<&Path>,
        said_by: impl Fn(&str) -> Source,
    ) -> Result<Self, Problem> {
        let (path, named) = match &options.config {
            Some(path) => (path.clone(), true),
            None => (PathBuf::from(DEFAULT_CONFIG_FILE), false),
        };
        let path = absolute(&path)?;
        let (from, read) = match file::read(&path) {
            Ok(Some(from)) => (from, Some(path)),
            Ok(None) if named => return Err(Problem(format!("{}: there is no such file", path.display()))),
            Ok(None) => (file::FileConfig::default(), None),
            Err(words) => return Err(Problem(words)),
        };
        let mut p = Picker { file: read.as_deref(), said_by: &said_by, settings: BTreeMap::new() };
        let wanted =
            p.pick("mountpoint", mountpoint.map(Path::to_owned), from.mountpoint, DEFAULT_MOUNTPOINT.into(), |p| {
                path_text(p)
            });
        let mountpoint = mountpoint_path(&wanted)?;
        let state =
            p.pick("state_dir", options.state_dir.clone(), from.state_dir, DEFAULT_STATE_DIR.into(), |p| path_text(p));
        let state_dir = absolute(&state)?;
        let provider = p.pick("provider", options.provider, from.provider, Provider::Loop, Provider::to_string);
        let group = p.pick("group", options.group.clone(), from.group, default_group()?, String::clone);
        let group = find_group(&group)?;
        let log = p.pick("log", options.log.clone(), from.log, "info".into(), String::clone);
        if let Err(e) = tracing_subscriber::EnvFilter::try_new(&log) {
            return Err(Problem(format!("log filter {log:?} is not valid: {e}")));
        }
        let log_file = p.pick("log_file", options.log_file.clone().map(Some), from.log_file.map(Some), None, |f| {
            f.as_deref().map_or_else(|| "standard error".into(), path_text)
        });
        let log_file = log_file.map(|f| absolute(&f)).transpose()?;
        let read_only = p.pick("read_only", options.read_only, from.read_only, false, bool::to_string);
        let interval =
            p.pick("reconcile_interval", None, from.reconcile_interval.map(|n| n.0), 30, |n| format!("{n} s"));
        let protect =
            p.pick("protect", None, (!from.protected.is_empty()).then_some(from.protected), Vec::new(), |ids| {
                if ids.is_empty() {
                    "none".into()
                } else {
                    ids.iter().map(VolumeId::to_string).collect::<Vec<_>>().join(" ")
                }
            });
        let default_export = ExportName("{uuid}".into());
        let export_name =
            p.pick("export_name", None, from.export_name.map(|n| n.0), default_export, |n| n.template().to_owned());
        let size_check = p.pick("size_check", None, from.size_check, SizeCheck::Exact, SizeCheck::to_string);
        let history = p.pick("history", None, from.history.map(|n| n.0), 10_000, u64::to_string);
        let own = from.loop_provider;
        let dir = p.pick("loop.dir", None, own.dir, state_dir.join("loop"), |p| path_text(p));
        let trash = p.pick("loop.trash_keep", None, own.trash_keep.map(|n| n.0), 7 * 86_400, |n| format!("{n} s"));
        let capacity = p.pick("loop.capacity", None, own.capacity.map(|n| Some(n.0)), None, |n| {
            n.map_or_else(|| "what the filesystem has".into(), |n| format!("{n} bytes"))
        });
        let most_disks = p.pick("loop.most_disks", None, own.most_disks.map(|n| n.0), 256, u64::to_string);
        let cloudstack = CloudStackConfig::build(&mut p, from.cloudstack)?;
        let mut settings: Vec<Setting> = p.settings.into_values().collect();
        // Of a provider that is not used only what somebody said is of interest.
        if provider != Provider::Cloudstack {
            settings.retain(|s| !s.name.starts_with("cloudstack.") || s.source != Source::Default);
        }
        let config = Config {
            mountpoint,
            state_dir,
            provider,
            group,
            log,
            log_file,
            read_only,
            reconcile_interval: Duration::from_secs(interval),
            protect,
            export_name,
            size_check,
            history: usize::try_from(history).unwrap_or(usize::MAX),
            loop_provider: LoopConfig {
                dir: absolute(&dir)?,
                trash_keep: Duration::from_secs(trash),
                capacity,
                most_disks: u32::try_from(most_disks).unwrap_or(u32::MAX),
            },
            cloudstack,
            file: read,
            settings,
        };
        config.places()?;
        Ok(config)
    }

    /// A directory or file of ours below the mount point would be asked of ourselves, and hang.
    fn places(&self) -> Result<(), Problem> {
        let dirs = [
            ("state_dir", Some(&self.state_dir)),
            ("loop.dir", Some(&self.loop_provider.dir)),
            ("log_file", self.log_file.as_ref()),
            ("cloudstack.credentials", self.cloudstack.credentials.as_ref()),
            ("cloudstack.ca", self.cloudstack.ca.as_ref()),
        ];
        for (name, dir) in dirs {
            if let Some(dir) = dir.filter(|d| d.starts_with(&self.mountpoint)) {
                return Err(Problem(format!(
                    "{name} {} lies below the mount point {}: take one beside it",
                    dir.display(),
                    self.mountpoint.display()
                )));
            }
        }
        Ok(())
    }
}

fn absolute(path: &Path) -> Result<PathBuf, Problem> {
    std::path::absolute(path).map_err(|e| Problem::with(path.display(), e))
}

/// The mount point as the kernel shows it in mountinfo. The last component is not touched: a dead
/// mount there answers ENOTCONN to everything, and a live one is somebody's.
pub fn mountpoint_path(path: &Path) -> Result<PathBuf, Problem> {
    let path = absolute(path)?;
    let Some((parent, name)) = path.parent().zip(path.file_name()) else {
        return Err(Problem(format!("{} cannot be a mount point for volfs", path.display())));
    };
    // A parent that does not exist is made at mount, and has no links to follow.
    let parent = parent.canonicalize().unwrap_or_else(|_| parent.to_owned());
    Ok(parent.join(name))
}

fn default_group() -> Result<String, Problem> {
    Ok(if groups()?.contains_key(DEFAULT_GROUP) { DEFAULT_GROUP.into() } else { "root".into() })
}

/// The group of that name or number. Only /etc/group is asked: a daemon that starts before the
/// network must not wait for a directory service.
fn find_group(name: &str) -> Result<Group, Problem> {
    if let Some(gid) = groups()?.get(name) {
        return Ok(Group { name: name.into(), gid: *gid });
    }
    match name {
        "root" => Ok(Group { name: name.into(), gid: 0 }),
        _ => match name.parse() {
            Ok(gid) => Ok(Group { name: name.into(), gid }),
            Err(_) => Err(Problem(format!("there is no group {name:?} in {GROUP_FILE}: groupadd it, or name another"))),
        },
    }
}

fn groups() -> Result<BTreeMap<String, u32>, Problem> {
    match std::fs::read(GROUP_FILE) {
        Ok(bytes) => Ok(parse_groups(&String::from_utf8_lossy(&bytes))),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(BTreeMap::new()),
        Err(e) => Err(Problem::with(GROUP_FILE, e)),
    }
}

fn parse_groups(text: &str) -> BTreeMap<String, u32> {
    let mut groups = BTreeMap::new();
    for line in text.lines() {
        let mut fields = line.split(':');
        if let (Some(name), Some(_), Some(gid)) = (fields.next(), fields.next(), fields.next())
            && let Ok(gid) = gid.parse()
        {
            groups.entry(name.to_owned()).or_insert(gid);
        }
    }
    groups
}

#[cfg(test)]
mod tests;
