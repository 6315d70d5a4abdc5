//! The fake cloud as a program: for trying `volfs --provider cloudstack` by hand, and for benches.
//!
//! Prints one line of JSON with all that a client needs and runs until SIGTERM, SIGINT, or the end of
//! its standard input where that is a pipe or a socket (a terminal or `/dev/null` is not watched).

use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use fakecloud::{FakeCloud, NewVm, Options, Signatures};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::FileType;

#[derive(Parser)]
#[command(about = "An Apache CloudStack look-alike; its host VM's disks are loop devices of this machine", version)]
struct Args {
    /// Where to listen: an address of this machine only
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: String,
    /// Where volumes' files are, and stay afterwards; without it a temporary directory
    #[arg(long)]
    dir: Option<PathBuf>,
    /// How long each job takes in its turn
    #[arg(long, default_value_t = 0.02)]
    job_seconds: f64,
    /// The host VM's id; without it a random one
    #[arg(long)]
    host: Option<String>,
    /// A further, running VM; may be given several times
    #[arg(long = "vm", value_name = "NAME")]
    vms: Vec<String>,
    /// No devices: only the cloud's books. Needs no root
    #[arg(long)]
    books_only: bool,
    /// Which signatures are taken
    #[arg(long, value_enum, default_value_t = Hash::Sha1)]
    signatures: Hash,
    /// As with enforce.post.requests.and.timestamps
    #[arg(long)]
    enforce_post: bool,
    /// Do not take customjobid
    #[arg(long)]
    no_custom_job_ids: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Hash {
    Sha1,
    Sha512,
    Either,
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("fakecloud: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> io::Result<()> {
    // Before any thread: all of them are to leave the signals to the descriptor.
    let signals = signals()?;
    let delay = Duration::try_from_secs_f64(args.job_seconds).map_err(io::Error::other)?;
    let mut options = Options {
        listen: args.listen,
        dir: args.dir,
        job_delay: delay,
        vms: args.vms.iter().map(|name| NewVm::new(name)).collect(),
        signatures: match args.signatures {
            Hash::Sha1 => Signatures::Sha1,
            Hash::Sha512 => Signatures::Sha512,
            Hash::Either => Signatures::Either,
        },
        enforce_post: args.enforce_post,
        custom_job_ids: !args.no_custom_job_ids,
        ..Options::default()
    };
    if let Some(host) = args.host {
        options.host.id = host;
    }
    if !args.books_only {
        options = options.loops();
    }
    let vms: Vec<_> = options.vms.iter().map(|vm| vm.id.clone()).collect();
    let cloud = FakeCloud::start(options)?;
    let (zones, offerings) = (cloud.zones(), cloud.offerings());
    let line = serde_json::json!({
        "endpoint": cloud.endpoint(),
        "key": cloud.key(),
        "secret": cloud.secret(),
        "host": cloud.host(),
        "zone": zones[0].id,
        "zone_name": zones[0].name,
        "offering": offerings[0].id,
        "fixed_offering": offerings[1].id,
        "vms": vms,
    });
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()?;
    drop(out);
    wait(&signals)
}

/// A descriptor that becomes readable with SIGTERM or SIGINT.
fn signals() -> io::Result<OwnedFd> {
    // SAFETY: the set is initialised by sigemptyset before its use and outlives the calls;
    // signalfd's answer is checked before it is taken for a descriptor that is ours alone.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::sigaddset(&mut set, libc::SIGINT);
        if libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = libc::signalfd(-1, &set, libc::SFD_CLOEXEC);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}

fn wait(signals: &OwnedFd) -> io::Result<()> {
    let stdin = io::stdin();
    let kind = rustix::fs::fstat(stdin.as_fd()).map(|stat| FileType::from_raw_mode(stat.st_mode));
    let mut watched = !stdin.is_terminal() && matches!(kind, Ok(FileType::Fifo | FileType::Socket));
    loop {
        let mut fds = vec![PollFd::new(signals, PollFlags::IN)];
        if watched {
            fds.push(PollFd::new(&stdin, PollFlags::IN));
        }
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        if !fds[0].revents().is_empty() {
            return Ok(());
        }
        if fds.get(1).is_some_and(|fd| !fd.revents().is_empty()) {
            let mut rest = [0; 256];
            // Not by the buffered handle: what it keeps back, poll does not see.
            match rustix::io::read(&stdin, &mut rest) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(_) => watched = false,
            }
        }
    }
}
