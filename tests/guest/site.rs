//! The whole of it: a cloud, its host VM as a machine of QEMU, and volfs running in that.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use fakecloud::{FakeCloud, NewVm, Options};

use crate::agent::Said;
use crate::hypervisor::OverQmp;
use crate::machine::{Bus, Machine};

/// Where the tree is in the guest.
const ROOT: &str = "/run/volfs";
const JOB: &str = "job";

/// A cloud with a host on which volfs runs; the cloud goes first, and switches the machine off.
pub struct Site {
    pub cloud: FakeCloud,
    pub machine: Arc<Machine>,
    bus: Bus,
}

impl Site {
    /// Starts everything; the root disk is a filesystem below `/var`, so that volfs's record is on it.
    pub fn start(bus: Bus) -> Self {
        let host = NewVm::new("migration-host");
        let vm = host.id.clone();
        let machine = Arc::new(Machine::new(&vm, bus));
        let hypervisor = Box::new(OverQmp { vm: vm.clone(), machine: machine.clone() });
        let cloud = FakeCloud::start(Options { host, hypervisor, root_disk: 64 << 20, ..Options::default() }).unwrap();
        let root = &cloud.on_vm(&vm)[0].id;
        // The machine has not begun to read it.
        let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(cloud.file(root)).output().expect("mkfs.ext4");
        assert!(made.status.success(), "mkfs.ext4: {}", String::from_utf8_lossy(&made.stderr));
        machine.boot();
        let site = Site { cloud, machine, bus };
        site.serve();
        site
    }

    /// Starts volfs in a guest that has just booted. Which VM it is, volfs finds out by itself.
    pub fn serve(&self) {
        let root = &self.cloud.on_vm(&self.cloud.host())[0].id;
        let serial = root.replace('-', "")[..20].to_owned();
        let identity = match self.bus {
            Bus::VirtioBlk => "serial",
            Bus::VirtioScsi => "device/vpd_pg80",
        };
        self.machine.ok(&format!(
            "for disk in /sys/block/[vs]d*; do \
                 if grep -q {serial} $disk/{identity}; then mount -t ext4 /dev/${{disk##*/}} /var; fi; \
             done; \
             grep -q ' /var ' /proc/mounts && mkdir -p /var/lib /var/log"
        ));
        let cloud = &self.cloud;
        let said = self.machine.run(&format!(
            "export CLOUDSTACK_ENDPOINT=http://10.0.2.2:{}/client/api CLOUDSTACK_KEY={} CLOUDSTACK_SECRET={}\n\
             mkdir -p /etc/volfs; cat > /etc/volfs/config.toml << end\n\
             provider = \"cloudstack\"\n\
             [cloudstack]\n\
             zone = \"{}\"\n\
             offering = \"{}\"\n\
             end\n\
             volfs --log info,volfs=debug --log-file /var/log/volfs.log mount --background {ROOT}",
            cloud.address().port(),
            cloud.key(),
            cloud.secret(),
            cloud.zones()[0].id,
            cloud.offerings()[0].id,
        ));
        assert_eq!(said.status, 0, "volfs did not start: {}\n{}", said.out, self.words());
    }

    /// What everything printed: for the words of a failure.
    pub fn words(&self) -> String {
        let log = self.machine.run(
            "cat /var/log/volfs.log; echo '--- the tree:'; cat /run/volfs/health /run/volfs/table /run/volfs/problems",
        );
        format!("{}--- volfs:\n{}", self.machine.words(), log.out)
    }

    /// Runs a script in the guest, in the job's directory, with `$R` the root of the tree.
    #[track_caller]
    pub fn run(&self, script: &str) -> Said {
        self.machine.run(&Self::at_the_job(script))
    }

    fn at_the_job(script: &str) -> String {
        format!("R={ROOT}; cd $R/jobs/{JOB} 2> /dev/null || cd $R; {script}")
    }

    /// A script that must succeed; its output without the last newline.
    #[track_caller]
    pub fn ok(&self, script: &str) -> String {
        let said = self.run(script);
        assert_eq!(said.status, 0, "`{script}`: {}\n{}", said.out, self.words());
        said.out.trim_end_matches('\n').to_owned()
    }

    /// A script that must fail with this sentence of an errno.
    #[track_caller]
    pub fn refused(&self, script: &str, errno: &str) {
        let said = self.run(script);
        assert!(said.status != 0 && said.out.contains(errno), "`{script}`: {said:?}, not {errno}\n{}", self.words());
    }

    /// Makes the job. The contract gives the record's commit one second, then EIO and nothing has
    /// happened: too little at times for an emulated processor that has just booted.
    #[track_caller]
    pub fn mkdir(&self) {
        self.until(&format!("mkdir $R/jobs/{JOB} 2> /tmp/why || ! grep -q 'Input/output error' /tmp/why"));
        self.ok(&format!("[ -d $R/jobs/{JOB} ] || cat /tmp/why"));
    }

    /// Makes the job with disks of 1 GiB each, side by side; their volumes' ids in this order.
    #[track_caller]
    pub fn job(&self, disks: &[&str]) -> Vec<String> {
        self.mkdir();
        let disks = disks.join(" ");
        let links = self.ok(&format!(
            "for d in {disks}; do echo create $d 1G > control & done; wait; cd disks; for d in {disks}; do readlink $d; done"
        ));
        links.lines().map(|link| link.rsplit('/').next().unwrap_or_default().to_owned()).collect()
    }

    /// Waits until a condition of the shell holds in the guest.
    #[track_caller]
    pub fn until(&self, condition: &str) {
        self.ok(&format!("n=0; until {condition}; do n=$((n+1)); [ $n -lt 1500 ] || exit 1; usleep 20000; done"));
    }

    /// The n-th disk's node: 0 is the root disk after the first boot.
    pub fn node(&self, n: u8) -> String {
        let letter = char::from(b'a' + n);
        match self.bus {
            Bus::VirtioBlk => format!("/dev/vd{letter}"),
            Bus::VirtioScsi => format!("/dev/sd{letter}"),
        }
    }

    /// Whether the first `length` bytes of the volume are those of [`FILL`] and all after them is zero,
    /// read from the cloud's storage.
    pub fn holds(&self, volume: &str, length: usize) -> Result<(), String> {
        check(&self.cloud.file(volume), volume, length)
    }
}

/// The shell's part: writes `$2` bytes of the volume `$1`'s own text to `disks/DISK/block`, given as `$3`.
pub const FILL: &str = "fill() { yes $1 | head -c $2 | dd of=$3 bs=64k conv=fsync 2> /dev/null; }";

fn check(file: &Path, volume: &str, length: usize) -> Result<(), String> {
    let file = File::open(file).map_err(|e| e.to_string())?;
    // A good deal after it, too, and the end.
    let size = file.metadata().map_err(|e| e.to_string())?.len();
    let mut found = vec![0; length + (1 << 20)];
    let mut end = vec![0; 1 << 20];
    file.read_exact_at(&mut found, 0).map_err(|e| e.to_string())?;
    file.read_exact_at(&mut end, size - (1 << 20)).map_err(|e| e.to_string())?;
    let line = format!("{volume}\n");
    let mut wanted: Vec<u8> = line.bytes().cycle().take(length).collect();
    wanted.resize(found.len(), 0);
    match found.iter().chain(&end).zip(wanted.iter().chain(&[0; 1 << 20])).position(|(f, w)| f != w) {
        None => Ok(()),
        Some(at) => {
            let words =
                String::from_utf8_lossy(&found[at.min(found.len() - 1)..(at + 80).min(found.len())]).into_owned();
            Err(format!("volume {volume} has {words:?} at byte {at}"))
        }
    }
}
