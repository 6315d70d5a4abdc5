"""The life of volumes by the Python package cs: its signing, its paging, its waiting for jobs."""
import os
import sys

from cs import CloudStack, CloudStackApiException

env = os.environ
method = sys.argv[1]
cs = CloudStack(endpoint=env["ENDPOINT"], key=env["KEY"], secret=env["SECRET"], method=method, poll_interval=0.02)
host = env["HOST"]

[zone] = cs.listZones()["zone"]
offerings = {o["name"]: o for o in cs.listDiskOfferings()["diskoffering"]}
custom = next(o for o in offerings.values() if o["iscustomized"])
[vm] = cs.listVirtualMachines(id=host, details="min")["virtualmachine"]
assert vm["state"] == "Running", vm
assert cs.listCapabilities()["capability"]["cloudstackversion"].startswith("4.")
assert cs.listApis(name="createTags")["api"][0]["isasync"] is True

# createVolume, by cs's own waiting for the job.
name = "cs %s A+B/100%% *\u00c9_x.y-z" % method
made = cs.createVolume(name=name, zoneid=zone["id"], diskofferingid=custom["id"], size=2, fetch_result=True)["volume"]
volume = made["id"]
assert made["name"] == name and made["size"] == 2 << 30 and made["state"] == "Allocated", made
assert "deviceid" not in made and "virtualmachineid" not in made, made

attached = cs.attachVolume(id=volume, virtualmachineid=host, fetch_result=True)["volume"]
assert attached["deviceid"] == 1 and attached["virtualmachineid"] == host, attached
[seen] = cs.listVolumes(virtualmachineid=host, type="DATADISK")["volume"]
assert seen["id"] == volume and seen["state"] == "Ready", seen
try:
    cs.attachVolume(id=volume, virtualmachineid=host, fetch_result=True)
    raise SystemExit("attached twice")
except CloudStackApiException as e:
    assert e.error["errorcode"] == 431 and "not attached to any VM" in e.error["errortext"], e.error

resized = cs.resizeVolume(id=volume, size=3, fetch_result=True)["volume"]
assert resized["size"] == 3 << 30, resized

snapshot = cs.createSnapshot(volumeid=volume, fetch_result=True)["snapshot"]
assert snapshot["state"] == "BackedUp", snapshot
[seen] = cs.listSnapshots(volumeid=volume)["snapshot"]
assert seen["id"] == snapshot["id"], seen
assert cs.deleteSnapshot(id=snapshot["id"], fetch_result=True)["success"] is True
assert cs.listSnapshots(volumeid=volume) == {}

# Tags as a compare-and-set; cs writes a list of objects as tags[0].key and so on.
tag = {"resourceids": [volume], "resourcetype": "Volume"}
cs.createTags(tags=[{"key": "volfs", "value": "me/1"}], fetch_result=True, **tag)
[seen] = cs.listVolumes(tags=[{"key": "volfs", "value": "me/1"}])["volume"]
assert [(t["key"], t["value"]) for t in seen["tags"]] == [("volfs", "me/1")], seen
assert cs.listVolumes(tags=[{"key": "volfs", "value": "you/1"}]) == {}
for again in (cs.createTags, cs.deleteTags):
    try:
        again(tags=[{"key": "volfs", "value": "you/1"}], fetch_result=True, **tag)
        raise SystemExit("another's tag gave way")
    except CloudStackApiException as e:
        assert e.error["errorcode"] == 530, e.error
cs.deleteTags(tags=[{"key": "volfs", "value": "me/1"}], fetch_result=True, **tag)

renamed = cs.updateVolume(id=volume, name="renamed", fetch_result=True)["volume"]
assert renamed["name"] == "renamed", renamed
cs.detachVolume(id=volume, fetch_result=True)
[seen] = cs.listVolumes(id=volume)["volume"]
assert "deviceid" not in seen and "virtualmachineid" not in seen and "attached" not in seen, seen

# Pages, collected by cs.
for n in range(4):
    cs.createVolume(name="page-%d" % n, zoneid=zone["id"], diskofferingid=custom["id"], size=1, fetch_result=True)
pages = cs.listVolumes(keyword="page-", fetch_list=True)
assert len(pages) == 4 and len({v["id"] for v in pages}) == 4, pages
for page in pages:
    # Not yet on storage: such a volume can only go for good.
    cs.destroyVolume(id=page["id"], fetch_result=True)
assert cs.listVolumes(keyword="page-") == {}

gone = cs.destroyVolume(id=volume, fetch_result=True)["volume"]
assert gone["state"] == "Destroy", gone
cs.recoverVolume(id=volume)
assert cs.deleteVolume(id=volume)["success"] is True
assert cs.listVolumes(id=volume) == {}

# What cs signs wrongly (it leaves ~ as it is) a server refuses; other refusals have their codes.
for call, code in [
    (lambda: cs.listVolumes(name="backup~1"), 401),
    (lambda: cs.listvolumes(), 401),
    (lambda: cs.listVolumes(id="3c9a6f0e-5b7d-4e1a-8f22-0a1b2c3d4e5f"), 431),
    (lambda: cs.listVolumes(page=1, pagesize=501), 431),
    (lambda: cs.queryAsyncJobResult(jobid="3c9a6f0e-5b7d-4e1a-8f22-0a1b2c3d4e5f"), 431),
]:
    try:
        call()
        raise SystemExit("not refused")
    except CloudStackApiException as e:
        assert e.error["errorcode"] == code == e.response.status_code, e.error
stranger = CloudStack(endpoint=env["ENDPOINT"], key=env["KEY"], secret="wrong", method=method)
try:
    stranger.listZones()
    raise SystemExit("a wrong secret was taken")
except CloudStackApiException as e:
    assert e.error["errorcode"] == 401, e.error
