"""The life of a volume by apache-libcloud's CloudStack driver."""
import os
from urllib.parse import urlparse

from libcloud.common.types import ProviderError
from libcloud.compute.providers import get_driver
from libcloud.compute.types import Provider, StorageVolumeState

env = os.environ
url = urlparse(env["ENDPOINT"])
driver = get_driver(Provider.CLOUDSTACK)(
    key=env["KEY"], secret=env["SECRET"], secure=False, host=url.hostname, port=url.port, path=url.path
)
driver.connection.poll_interval = 0.02

[zone] = driver.list_locations()
[node] = [n for n in driver.list_nodes() if n.id == env["HOST"]]
before = {v.id for v in driver.list_volumes()}

volume = driver.create_volume(2, "libcloud one", location=zone)
assert volume.id not in before
assert driver.attach_volume(node, volume)
[seen] = [v for v in driver.list_volumes(node) if v.id == volume.id]
assert seen.state == StorageVolumeState.INUSE, (seen, seen.state)
assert seen.size == 2 << 30 and seen.extra["device_id"] == 1, (seen.size, seen.extra)

# It has no call of its own for this.
driver._async_request("resizeVolume", params={"id": volume.id, "size": 3})
assert driver.ex_get_volume(volume.id).size == 3 << 30

snapshot = driver.create_volume_snapshot(volume)
assert snapshot.id in [s.id for s in driver.list_snapshots()]
assert driver.destroy_volume_snapshot(snapshot)

assert driver.ex_create_tags([volume.id], "Volume", {"volfs": "me/1", "volfs-job": "a b"})
assert driver.ex_get_volume(volume.id).extra["tags"] == {"volfs": "me/1", "volfs-job": "a b"}
assert driver.ex_delete_tags([volume.id], "Volume", ["volfs", "volfs-job"])
assert driver.ex_get_volume(volume.id).extra["tags"] == {}

try:
    driver.destroy_volume(volume)
    raise SystemExit("an attached volume was deleted")
except ProviderError as e:
    assert e.http_code == 431 and "not attached" in str(e), e
assert driver.detach_volume(volume)
assert driver.ex_get_volume(volume.id).state == StorageVolumeState.AVAILABLE
assert driver.destroy_volume(volume)
assert {v.id for v in driver.list_volumes()} == before
