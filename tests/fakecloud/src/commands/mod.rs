//! The commands (section 2): one function each.

mod info;
mod jobs;
pub(crate) mod shown;
mod snapshots;
mod tags;
mod volumes;

use serde_json::Value;

use crate::answer::Refusal;
use crate::api::Call;
use crate::options::Account;
use crate::params::invalid;
use crate::state::{Snapshot, Vm, Volume, World};

/// A command.
pub(crate) struct Command {
    pub name: &'static str,
    pub is_async: bool,
    pub run: fn(&Call<'_>) -> Result<Value, Refusal>,
}

const fn command(name: &'static str, is_async: bool, run: fn(&Call<'_>) -> Result<Value, Refusal>) -> Command {
    Command { name, is_async, run }
}

/// All of them.
pub(crate) static ALL: &[Command] = &[
    command("attachVolume", true, volumes::attach),
    command("createSnapshot", true, snapshots::create),
    command("createTags", true, tags::create),
    command("createVolume", true, volumes::create),
    command("deleteSnapshot", true, snapshots::delete),
    command("deleteTags", true, tags::delete),
    command("deleteVolume", false, volumes::delete),
    command("destroyVolume", true, volumes::destroy),
    command("detachVolume", true, volumes::detach),
    command("listApis", false, info::apis),
    command("listAsyncJobs", false, jobs::list),
    command("listCapabilities", false, info::capabilities),
    command("listDiskOfferings", false, info::offerings),
    command("listEvents", false, info::events),
    // Not a volume client's, but libcloud's list of VMs asks for them.
    command("listIpForwardingRules", false, info::nothing),
    command("listPortForwardingRules", false, info::nothing),
    command("listPublicIpAddresses", false, info::nothing),
    command("listSnapshotPolicies", false, info::snapshot_policies),
    command("listSnapshots", false, snapshots::list),
    command("listTags", false, tags::list),
    command("listVirtualMachines", false, info::vms),
    command("listVMSnapshot", false, info::vm_snapshots),
    command("listVolumes", false, volumes::list),
    command("listZones", false, info::zones),
    command("queryAsyncJobResult", false, jobs::query),
    command("recoverVolume", false, volumes::recover),
    command("resizeVolume", true, volumes::resize),
    command("revertSnapshot", true, snapshots::revert),
    command("updateVolume", true, volumes::update),
];

/// The command of exactly this name.
pub(crate) fn find(name: &str) -> Option<&'static Command> {
    ALL.iter().find(|c| c.name == name)
}

/// Something that belongs to an account or a project.
pub(crate) trait Owned {
    fn owner(&self) -> (&str, Option<&str>);
    fn hidden(&self) -> bool;
}

impl Owned for Volume {
    fn owner(&self) -> (&str, Option<&str>) {
        (&self.account, self.project.as_deref())
    }

    fn hidden(&self) -> bool {
        self.hidden
    }
}

impl Owned for Vm {
    fn owner(&self) -> (&str, Option<&str>) {
        (&self.account, self.project.as_deref())
    }

    fn hidden(&self) -> bool {
        self.hidden
    }
}

impl Owned for Snapshot {
    fn owner(&self) -> (&str, Option<&str>) {
        (&self.account, None)
    }

    fn hidden(&self) -> bool {
        false
    }
}

/// Whether the account may touch it.
pub(crate) fn may(account: &Account, thing: &impl Owned) -> bool {
    let (owner, project) = thing.owner();
    let member = project.is_some_and(|p| account.projects.iter().any(|mine| mine == p));
    !thing.hidden() && (account.admin || member || (project.is_none() && owner == account.name))
}

impl Call<'_> {
    /// The UUID in a parameter, of a row that is or was there; `None` if the parameter is absent.
    pub fn known(&self, name: &str, is: impl Fn(&str) -> bool) -> Result<Option<&str>, Refusal> {
        match self.params.get(name) {
            Some(id) if !is(id) => Err(invalid(self.command, name, id)),
            other => Ok(other),
        }
    }

    /// The row that a needed parameter names, which this account may touch.
    pub fn own<'w, T: Owned>(&self, name: &str, find: impl Fn(&str) -> Option<&'w T>) -> Result<&'w T, Refusal> {
        let id = self.need(name)?;
        let thing = find(id).ok_or_else(|| invalid(self.command, name, id))?;
        if may(&self.account, thing) {
            return Ok(thing);
        }
        let text = format!(
            "Acct[{}-{}] does not have permission to operate with resource",
            self.account.id, self.account.name
        );
        Err(Refusal::denied(text))
    }

    /// Whether a list shows it to this account: its own, those of a project only when asked for it,
    /// an admin's with `listall` or by id (2.1).
    pub fn sees(&self, thing: &impl Owned) -> bool {
        if !may(&self.account, thing) {
            return false;
        }
        let (owner, project) = thing.owner();
        if self.account.admin && (self.params.flag("listall") || self.params.get("id").is_some()) {
            return true;
        }
        match (project, self.params.get("projectid")) {
            (None, None) => owner == self.account.name,
            (Some(_), Some("-1")) => true,
            (None, Some("-1")) => owner == self.account.name,
            (Some(of), Some(asked)) => of == asked,
            _ => false,
        }
    }

    /// The ids of `id` and `ids`, all of them known; `None` when neither is there.
    pub fn ids(&self, is: impl Fn(&str) -> bool) -> Result<Option<Vec<&str>>, Refusal> {
        let mut wanted: Option<Vec<_>> = self.known("id", &is)?.map(|id| vec![id]);
        if let Some(ids) = self.params.list("ids") {
            if let Some(bad) = ids.iter().find(|id| !is(id)) {
                return Err(invalid(self.command, "ids", bad));
            }
            if wanted.is_some() {
                return Err(Refusal::parameter("Specify either id or ids but not both parameters"));
            }
            wanted = Some(ids);
        }
        Ok(wanted)
    }
}

/// Whether a volume of this id is or was there.
pub(crate) fn volume_known(world: &World) -> impl Fn(&str) -> bool {
    |id| world.volumes.contains_key(id)
}
