//! Which VM is this? What this host says of itself, in the order of its trustworthiness (page 7.2).
//!
//! Whatever is found here is proved by the root disk before anything is changed (`engine::host`): a
//! template's clone may carry another's files, and only the cloud knows.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use uuid::Uuid;

use crate::model::VmId;

/// How long a metadata service may take: a start must not wait for one that is absent.
const METADATA_WAIT: Duration = Duration::from_secs(2);
/// Where the virtual router serves it, by the name that CloudStack's DHCP server makes known.
const METADATA: &str = "http://data-server./latest/instance-id";

/// Who said which id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// The id.
    pub id: VmId,
    /// Who said so, in words.
    pub source: String,
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.id, self.source)
    }
}

/// The id that was configured, or `NODE_ID`, or what this host's files and metadata service say.
///
/// # Errors
/// A sentence that says what was tried.
pub async fn find(configured: Option<VmId>) -> Result<Host, String> {
    if let Some(id) = configured {
        return Ok(Host { id, source: "configuration".into() });
    }
    let node = std::env::var("NODE_ID").ok();
    if let Some(host) = local(Path::new("/"), node.as_deref())? {
        return Ok(host);
    }
    let metadata = metadata().await;
    metadata.map_err(|why| {
        format!(
            "this host's VM id is not known: no NODE_ID, no cloud-init, no CloudStack in its DMI data, and {why}; set \
             cloudstack.host to the id that the cloud shows for this VM"
        )
    })
}

/// What this host's own files say; `root` is `/` but in tests.
fn local(root: &Path, node: Option<&str>) -> Result<Option<Host>, String> {
    if let Some(text) = node {
        let id = uuid(text).ok_or_else(|| format!("NODE_ID is {text:?}, which is no UUID"))?;
        return Ok(Some(Host { id, source: "NODE_ID".into() }));
    }
    let found = |id: Option<VmId>, source: &str| id.map(|id| Host { id, source: source.into() });
    let read = |below: &str| std::fs::read_to_string(root.join(below)).ok();
    let cloud_init = read("run/cloud-init/instance-data.json").and_then(|text| cloud_init(&text));
    let ignition = || read("run/metadata/coreos").and_then(|text| ignition(&text));
    let dmi = || {
        let vendor = read("sys/class/dmi/id/sys_vendor").unwrap_or_default();
        let product = read("sys/class/dmi/id/product_name").unwrap_or_default();
        // VMware and XenServer make a UUID of their own, and so does a machine of metal.
        let kvm = vendor.contains("Apache Software Foundation") || product.contains("CloudStack KVM");
        if !kvm && !vendor.starts_with("QEMU") {
            return None;
        }
        uuid(&read("sys/class/dmi/id/product_uuid")?)
    };
    Ok(found(cloud_init, "cloud-init")
        .or_else(|| found(ignition(), "Ignition's metadata"))
        .or_else(|| found(dmi(), "DMI product UUID")))
}

fn uuid(text: &str) -> Option<VmId> {
    Uuid::try_parse(text.trim()).ok().filter(|id| !id.is_nil()).map(VmId)
}

/// `v1.instance_id`, where the datasource is CloudStack's.
fn cloud_init(text: &str) -> Option<VmId> {
    let data: serde_json::Value = serde_json::from_str(text).ok()?;
    let v1 = data.get("v1")?;
    let cloud = v1.get("cloud_name")?.as_str()?;
    if !cloud.eq_ignore_ascii_case("cloudstack") {
        return None;
    }
    uuid(v1.get("instance_id")?.as_str()?)
}

fn ignition(text: &str) -> Option<VmId> {
    uuid(text.lines().find_map(|line| line.strip_prefix("COREOS_CLOUDSTACK_INSTANCE_ID="))?)
}

async fn metadata() -> Result<Host, String> {
    let failed = |error: reqwest::Error| format!("{METADATA} does not answer ({})", error.without_url());
    let client = reqwest::Client::builder()
        .timeout(METADATA_WAIT)
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .build()
        .map_err(failed)?;
    let answer = client.get(METADATA).send().await.and_then(reqwest::Response::error_for_status).map_err(failed)?;
    let text = answer.text().await.map_err(failed)?;
    let id = uuid(&text).ok_or_else(|| format!("{METADATA} answers {:?}, which is no UUID", short(&text)))?;
    Ok(Host { id, source: "the metadata service".into() })
}

fn short(text: &str) -> String {
    text.chars().take(60).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "8f1f4c3e-2f0b-4a57-9d0e-1c2b3a4d5e6f";
    const OTHER: &str = "11111111-2222-4333-8444-555566667777";

    fn host(files: &[(&str, &str)], node: Option<&str>) -> Option<String> {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        local(root.path(), node).unwrap().map(|host| host.to_string())
    }

    #[test]
    fn the_first_source_that_knows_wins() {
        let cloud_init = format!(r#"{{"v1": {{"cloud_name": "CloudStack", "instance_id": "{ID}"}}}}"#);
        let ignition = format!("A=1\nCOREOS_CLOUDSTACK_INSTANCE_ID={OTHER}\n");
        let all =
            [("run/cloud-init/instance-data.json", cloud_init.as_str()), ("run/metadata/coreos", ignition.as_str())];
        assert_eq!(host(&all, Some(OTHER)), Some(format!("{OTHER} (NODE_ID)")));
        assert_eq!(host(&all, None), Some(format!("{ID} (cloud-init)")));
        assert_eq!(host(&all[1..], None), Some(format!("{OTHER} (Ignition's metadata)")));
        assert_eq!(host(&[], None), None);
        assert!(local(Path::new("/no/such/place"), Some("i-2-3-VM")).unwrap_err().contains("no UUID"));
    }

    #[test]
    fn another_clouds_data_and_another_hypervisors_uuid_are_not_believed() {
        let other_cloud = format!(r#"{{"v1": {{"cloud_name": "aws", "instance_id": "{ID}"}}}}"#);
        assert_eq!(host(&[("run/cloud-init/instance-data.json", &other_cloud)], None), None);
        assert_eq!(host(&[("run/cloud-init/instance-data.json", "{\"v1\": [1]}")], None), None);
        let dmi = |vendor: &str| {
            let uuid = ID.to_uppercase();
            host(&[("sys/class/dmi/id/sys_vendor", vendor), ("sys/class/dmi/id/product_uuid", &uuid)], None)
        };
        assert_eq!(dmi("Apache Software Foundation\n"), Some(format!("{ID} (DMI product UUID)")));
        assert_eq!(dmi("VMware, Inc.\n"), None);
        assert_eq!(dmi("Dell Inc.\n"), None);
    }
}
