-- Schema 1 of volfs.db. Described column by column in contrib/schema.md.
-- Times are milliseconds since 1970 UTC; sizes are bytes; UUIDs are lower-case with dashes.

CREATE TABLE meta (
    key   TEXT NOT NULL PRIMARY KEY,
    value TEXT NOT NULL
) STRICT;

CREATE TABLE jobs (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    name         TEXT NOT NULL CHECK (length(name) BETWEEN 1 AND 191 AND name NOT GLOB '*[^-A-Za-z0-9._]*' AND name NOT GLOB '.*'),
    vm_name      TEXT NOT NULL DEFAULT '',
    hold         INTEGER NOT NULL DEFAULT 0 CHECK (hold IN (0, 1)),
    created_at   INTEGER NOT NULL,
    vm_name_at   INTEGER NOT NULL,
    hold_at      INTEGER NOT NULL,
    forgotten_at INTEGER
) STRICT;

-- A forgotten job's name is free again.
CREATE UNIQUE INDEX jobs_live_name ON jobs (name) WHERE forgotten_at IS NULL;

CREATE TABLE ossea_volumes (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    volume_id   TEXT NOT NULL UNIQUE CHECK (length(volume_id) = 36),
    volume_name TEXT NOT NULL,
    size        INTEGER NOT NULL CHECK (size >= 0),
    serial      TEXT NOT NULL DEFAULT '',
    cloud_state TEXT NOT NULL DEFAULT '',
    device_id   INTEGER CHECK (device_id >= 0),
    -- Settled words only: that an operation is in flight is said by its row in volume_operations.
    status      TEXT NOT NULL CHECK (status IN ('detached', 'attached', 'remote', 'lost', 'missing', 'unknown', 'conflict')),
    status_at   INTEGER NOT NULL,
    added_at    INTEGER NOT NULL,
    gone_at     INTEGER
) STRICT;

CREATE TABLE vm_disks (
    id              INTEGER PRIMARY KEY AUTOINCREMENT,
    job_id          INTEGER NOT NULL REFERENCES jobs (id) ON UPDATE RESTRICT ON DELETE RESTRICT,
    disk_name       TEXT NOT NULL CHECK (length(disk_name) BETWEEN 1 AND 64 AND disk_name NOT GLOB '*[^-A-Za-z0-9._]*' AND disk_name NOT GLOB '.*'),
    ossea_volume_id INTEGER NOT NULL UNIQUE REFERENCES ossea_volumes (id) ON UPDATE RESTRICT ON DELETE RESTRICT,
    epoch           INTEGER NOT NULL CHECK (epoch >= 0),
    changed_at      INTEGER NOT NULL,
    UNIQUE (job_id, disk_name)
) STRICT;

CREATE TABLE device_mappings (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    volume_uuid TEXT NOT NULL UNIQUE REFERENCES ossea_volumes (volume_id) ON UPDATE RESTRICT ON DELETE RESTRICT,
    vm_id       TEXT NOT NULL CHECK (length(vm_id) = 36),
    device_name TEXT CHECK (length(device_name) > 0 AND device_name NOT GLOB '*/*'),
    dev_major   INTEGER CHECK (dev_major >= 0),
    dev_minor   INTEGER CHECK (dev_minor >= 0),
    boot_id     TEXT CHECK (length(boot_id) = 36),
    diskseq     INTEGER CHECK (diskseq >= 0),
    size        INTEGER CHECK (size >= 0),
    mapped_at   INTEGER NOT NULL,
    -- The device is known whole or not at all.
    CHECK ((device_name IS NULL) = (dev_major IS NULL) AND (device_name IS NULL) = (dev_minor IS NULL)
       AND (device_name IS NULL) = (boot_id IS NULL) AND (device_name IS NULL) = (diskseq IS NULL)
       AND (device_name IS NULL) = (size IS NULL))
) STRICT;

-- One incarnation of a disk is never two volumes.
CREATE UNIQUE INDEX device_mappings_incarnation ON device_mappings (boot_id, diskseq) WHERE diskseq IS NOT NULL;

CREATE TABLE volume_operations (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    fence       TEXT NOT NULL UNIQUE CHECK (length(fence) = 36),
    verb        TEXT NOT NULL CHECK (verb IN ('create', 'claim', 'attach', 'detach', 'resize', 'snapshot', 'revert',
                    'delete-snapshot', 'delete', 'release', 'move', 'disk', 'destroy', 'reconcile', 'cancel', 'abandon',
                    'mkdir', 'rmdir', 'set')),
    command     TEXT NOT NULL,
    job_id      INTEGER REFERENCES jobs (id) ON UPDATE RESTRICT ON DELETE RESTRICT,
    volume_uuid TEXT REFERENCES ossea_volumes (volume_id) ON UPDATE RESTRICT ON DELETE RESTRICT,
    disk_name   TEXT,
    parent_id   INTEGER,
    detail      TEXT NOT NULL,
    step        TEXT NOT NULL,
    uid         INTEGER NOT NULL CHECK (uid >= 0),
    gid         INTEGER NOT NULL CHECK (gid >= 0),
    pid         INTEGER NOT NULL CHECK (pid >= 0),
    comm        TEXT NOT NULL,
    host_id     TEXT NOT NULL CHECK (length(host_id) = 36),
    boot_id     TEXT NOT NULL CHECK (length(boot_id) = 36),
    began_at    INTEGER NOT NULL,
    ended_at    INTEGER,
    outcome     TEXT CHECK (outcome IN ('done', 'failed', 'ambiguous', 'cancelled', 'interrupted', 'abandoned')),
    sentence    TEXT,
    CHECK ((ended_at IS NULL) = (outcome IS NULL) AND (ended_at IS NULL) = (sentence IS NULL))
) STRICT;

-- What a start has to settle is found without reading the history.
CREATE INDEX volume_operations_unfinished ON volume_operations (id) WHERE ended_at IS NULL;

CREATE TABLE volume_snapshots (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    volume_uuid TEXT NOT NULL REFERENCES ossea_volumes (volume_id) ON UPDATE RESTRICT ON DELETE RESTRICT,
    snapshot_id TEXT NOT NULL UNIQUE CHECK (length(snapshot_id) = 36),
    name        TEXT NOT NULL CHECK (length(name) BETWEEN 1 AND 64 AND name NOT GLOB '*[^-A-Za-z0-9._]*' AND name NOT GLOB '.*'),
    size        INTEGER NOT NULL CHECK (size >= 0),
    created_at  INTEGER NOT NULL,
    deleted_at  INTEGER
) STRICT;

CREATE UNIQUE INDEX volume_snapshots_live_name ON volume_snapshots (volume_uuid, name) WHERE deleted_at IS NULL;

-- For an operator with sqlite3: what each job has, as last recorded.
CREATE VIEW job_volumes (job_id, volume_id, volume_name, status, device_path) AS
SELECT j.name, v.volume_id, v.volume_name, v.status, '/dev/' || m.device_name
  FROM vm_disks d
  JOIN jobs j ON j.id = d.job_id
  JOIN ossea_volumes v ON v.id = d.ossea_volume_id
  LEFT JOIN device_mappings m ON m.volume_uuid = v.volume_id;
