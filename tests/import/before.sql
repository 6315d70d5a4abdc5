-- The old database before its second link was dropped, with a day's worth of rows in it.
CREATE TABLE replication_jobs (
  id varchar(191) NOT NULL,
  source_vm_name varchar(255) NOT NULL,
  status varchar(50) DEFAULT 'pending',
  ossea_config_id int DEFAULT NULL,
  vm_context_id varchar(64) DEFAULT NULL,
  PRIMARY KEY (id)
) ENGINE=InnoDB;
CREATE TABLE vm_replication_contexts (
  context_id varchar(64) NOT NULL,
  vm_name varchar(255) NOT NULL,
  current_job_id varchar(191) DEFAULT NULL,
  PRIMARY KEY (context_id),
  CONSTRAINT fk_context_job FOREIGN KEY (current_job_id) REFERENCES replication_jobs (id) ON DELETE SET NULL
) ENGINE=InnoDB;
ALTER TABLE replication_jobs ADD CONSTRAINT fk_job_context FOREIGN KEY (vm_context_id)
  REFERENCES vm_replication_contexts (context_id) ON DELETE CASCADE;
CREATE TABLE ossea_configs (
  id int NOT NULL AUTO_INCREMENT,
  name varchar(255) NOT NULL,
  api_url varchar(255) NOT NULL,
  api_key varchar(255) NOT NULL,
  secret_key varchar(255) NOT NULL,
  is_active tinyint(1) DEFAULT 1,
  blob_of_bits bit(8) DEFAULT b'101',
  PRIMARY KEY (id)
) ENGINE=InnoDB;
CREATE TABLE ossea_volumes (
  id int NOT NULL AUTO_INCREMENT,
  volume_id varchar(64) NOT NULL,
  volume_name varchar(255) NOT NULL,
  size_gb int NOT NULL,
  ossea_config_id int DEFAULT NULL,
  status varchar(50) DEFAULT 'creating',
  device_path varchar(255) DEFAULT NULL,
  raw blob DEFAULT NULL,
  password varchar(64) DEFAULT NULL,
  PRIMARY KEY (id),
  KEY idx_volume_id (volume_id)
) ENGINE=InnoDB;
CREATE TABLE device_mappings (
  id varchar(64) NOT NULL,
  volume_uuid varchar(64) NOT NULL,
  vm_id varchar(64) NOT NULL,
  operation_mode enum('oma','failover') NOT NULL DEFAULT 'oma',
  cloudstack_device_id int DEFAULT NULL,
  device_path varchar(255) NOT NULL,
  size bigint NOT NULL DEFAULT 0,
  PRIMARY KEY (id),
  UNIQUE KEY unique_volume_uuid (volume_uuid)
) ENGINE=InnoDB;
CREATE TABLE vm_disks (
  id int NOT NULL AUTO_INCREMENT,
  job_id varchar(191) DEFAULT NULL,
  vm_context_id varchar(64) DEFAULT NULL,
  disk_id varchar(191) NOT NULL,
  vmdk_path varchar(500) DEFAULT NULL,
  size_gb int NOT NULL DEFAULT 0,
  capacity_bytes bigint NOT NULL DEFAULT 0,
  unit_number int DEFAULT NULL,
  ossea_volume_id int DEFAULT NULL,
  cloudstack_volume_uuid varchar(64) DEFAULT NULL,
  PRIMARY KEY (id),
  KEY idx_job (job_id),
  CONSTRAINT fk_vm_disks_job FOREIGN KEY (job_id) REFERENCES replication_jobs (id) ON DELETE CASCADE,
  CONSTRAINT fk_vm_disks_volume FOREIGN KEY (ossea_volume_id) REFERENCES ossea_volumes (id) ON DELETE SET NULL,
  CONSTRAINT fk_vm_disks_device FOREIGN KEY (cloudstack_volume_uuid) REFERENCES device_mappings (volume_uuid) ON DELETE SET NULL
) ENGINE=InnoDB;
CREATE TABLE volume_operations (
  id varchar(64) NOT NULL,
  type enum('create','attach','detach','delete') NOT NULL,
  status enum('pending','executing','completed','failed','cancelled') NOT NULL,
  volume_id varchar(64) DEFAULT NULL,
  vm_id varchar(64) DEFAULT NULL,
  request json DEFAULT NULL,
  error text DEFAULT NULL,
  created_at timestamp NOT NULL DEFAULT current_timestamp(),
  PRIMARY KEY (id)
) ENGINE=InnoDB;
CREATE TABLE nbd_exports (
  id int NOT NULL AUTO_INCREMENT,
  volume_id varchar(64) NOT NULL,
  export_name varchar(255) NOT NULL,
  device_path varchar(255) NOT NULL,
  PRIMARY KEY (id)
) ENGINE=InnoDB;
CREATE VIEW active_jobs AS SELECT id, source_vm_name FROM replication_jobs WHERE status = 'replicating';

INSERT INTO replication_jobs VALUES
  ('job-pgtest2', 'pgtest2', 'completed', 1, NULL),
  ('job-pgwin', 'PGWINTESTBIOS', 'replicating', 1, NULL),
  ('job-quad', 'QUAD-AUVIK02 it''s \\ "here"', 'failed', 1, NULL),
  ('bad/name', 'slash', 'failed', 1, NULL);
INSERT INTO vm_replication_contexts VALUES
  ('ctx-pgtest2', 'pgtest2', 'job-pgtest2'), ('ctx-pgwin', 'PGWINTESTBIOS', 'job-pgwin'), ('ctx-quad', 'QUAD', NULL);
UPDATE replication_jobs SET vm_context_id = 'ctx-pgtest2' WHERE id = 'job-pgtest2';
UPDATE replication_jobs SET vm_context_id = 'ctx-pgwin' WHERE id = 'job-pgwin';
UPDATE replication_jobs SET vm_context_id = 'ctx-quad' WHERE id = 'job-quad';
INSERT INTO ossea_configs (name, api_url, api_key, secret_key) VALUES
  ('prod', 'http://cloud/client/api', 'canary-key-0xA1', 'canary-secret-0xB2\';DROP');
INSERT INTO ossea_volumes (id, volume_id, volume_name, size_gb, status, device_path, raw, password) VALUES
  (1, '11111111-1111-4111-8111-111111111111', 'vol-pgtest2-disk-2000', 1, 'attached', '/dev/vdb', x'0027225c0a1a00ff', 'canary-pw-0xC3'),
  (2, '22222222-2222-4222-8222-222222222222', 'vol-PGWINTESTBIOS', 1, 'attached', 'remote-vm-9', NULL, NULL),
  (3, '33333333-3333-4333-8333-333333333333', 'vol-quad-0', 1, 'attached', '/dev/mapper/vol33333333', NULL, NULL),
  (4, ' 44444444-4444-4444-8444-44444444ABCD', 'vol-quad-1', 2, 'available', '', NULL, NULL),
  (5, '55555555-5555-4555-8555-555555555555', 'vol-of-nobody', 1, 'available', NULL, NULL, NULL),
  (6, '66666666-6666-4666-8666-666666666666', 'vol-slash', 1, 'available', NULL, NULL, NULL);
INSERT INTO device_mappings VALUES
  ('m1', '11111111-1111-4111-8111-111111111111', 'sha', 'oma', 1, '/dev/vdb', 0),
  ('m2', '22222222-2222-4222-8222-222222222222', 'test-vm', 'failover', 0, 'remote-vm-test', 0),
  ('m3', '33333333-3333-4333-8333-333333333333', 'sha', 'oma', NULL, '/dev/mapper/vol33333333', 1073741824),
  ('m7', '77777777-7777-4777-8777-777777777777', 'sha', 'oma', NULL, '/dev/vdz', 0);
INSERT INTO vm_disks VALUES
  (1, 'job-pgtest2', 'ctx-pgtest2', 'disk-2000', '[ds1] pgtest2/pgtest2.vmdk', 1, 1073741824, 0, 1, '22222222-2222-4222-8222-222222222222'),
  (2, 'job-pgwin', 'ctx-pgwin', 'disk-2000', '[ds1] PGWIN''S/PGWIN.vmdk', 1, 1073741824, 0, 2, NULL),
  (3, 'job-quad', 'ctx-quad', 'disk-2000', '[ds1] quad/quad.vmdk', 1, 1073741824, 0, 3, '33333333-3333-4333-8333-333333333333'),
  (4, 'job-quad', 'ctx-quad', 'disk-2001', NULL, 2, 2147483648, 1, 4, NULL),
  (5, 'bad/name', NULL, 'disk-2000', NULL, 1, 1073741824, 0, 6, NULL),
  (6, 'job-quad', 'ctx-quad', 'disk-2002', NULL, 2, 2147483648, 2, NULL, NULL);
INSERT INTO volume_operations (id, type, status, volume_id, request, error) VALUES
  ('op-1', 'attach', 'executing', '33333333-3333-4333-8333-333333333333', '{"secret": "canary-json-0xD4"}', NULL),
  ('op-2', 'create', 'pending', NULL, '{}', NULL),
  ('op-3', 'delete', 'completed', '88888888-8888-4888-8888-888888888888', '{}', NULL),
  ('op-4', 'detach', 'failed', '33333333-3333-4333-8333-333333333333', '{}', 'no reply');
INSERT INTO nbd_exports (volume_id, export_name, device_path) VALUES
  ('33333333-3333-4333-8333-333333333333', 'migration-vol-3', '/dev/mapper/vol33333333');
DELIMITER ;;
CREATE TRIGGER note_disk BEFORE INSERT ON vm_disks FOR EACH ROW
BEGIN
  -- it's a body; with quotes
  IF NEW.disk_id = 'x;;y' THEN SET NEW.disk_id = 'INSERT INTO vm_disks VALUES (9);'; END IF;
END;;
CREATE PROCEDURE clean_up(IN job varchar(191))
BEGIN
  DELETE FROM vm_disks WHERE job_id = job; -- "the old way"
END;;
DELIMITER ;
