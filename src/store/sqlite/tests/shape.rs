use std::collections::{BTreeMap, BTreeSet};

use super::*;

/// A record's schema, with one row in each table.
fn filled() -> (TempDir, Connection) {
    let dir = dir();
    let store = SqliteStore::open(dir.path()).unwrap();
    put(
        &store,
        vec![
            job_add(1, "a"),
            volume_add(1),
            disk_add(1, 1, "d0", 1, 1),
            Change::MappingSet(mapping(1, 1, "loop3", 9)),
            Change::OpBegin(Box::new(OpRow { job: Some(JobRow(1)), volume: Some(vol(1)), ..op(1) })),
        ],
    );
    drop(store);
    let conn = Connection::open(dir.path().join("volfs.db")).unwrap();
    conn.pragma_update(None, "foreign_keys", 1).unwrap();
    conn.execute(
        "INSERT INTO volume_snapshots (volume_uuid, snapshot_id, name, size, created_at) VALUES (?1, ?2, 's', 1, 1)",
        [vol(1).to_string(), vol(500).to_string()],
    )
    .unwrap();
    (dir, conn)
}

fn strings(conn: &Connection, sql: &str) -> Vec<String> {
    conn.prepare(sql).unwrap().query_map([], |r| r.get(0)).unwrap().map(Result::unwrap).collect()
}

fn tables(conn: &Connection) -> Vec<String> {
    strings(conn, "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite%' ORDER BY name")
}

fn columns(conn: &Connection, table: &str) -> Vec<String> {
    strings(conn, &format!("SELECT name FROM pragma_table_info('{table}')"))
}

#[test]
fn there_are_six_foreign_keys_and_none_cascades() {
    let (_dir, conn) = filled();
    let mut found = BTreeSet::new();
    for table in tables(&conn) {
        let mut keys = conn.prepare(&format!("PRAGMA foreign_key_list({table})")).unwrap();
        let mut rows = keys.query([]).unwrap();
        while let Some(r) = rows.next().unwrap() {
            let text = |n: &str| r.get::<_, String>(n).unwrap();
            assert_eq!((text("on_update"), text("on_delete")), ("RESTRICT".into(), "RESTRICT".into()), "{table}");
            found.insert(format!("{table}.{} -> {}.{}", text("from"), text("table"), text("to")));
        }
    }
    let wanted = [
        "device_mappings.volume_uuid -> ossea_volumes.volume_id",
        "vm_disks.job_id -> jobs.id",
        "vm_disks.ossea_volume_id -> ossea_volumes.id",
        "volume_operations.job_id -> jobs.id",
        "volume_operations.volume_uuid -> ossea_volumes.volume_id",
        "volume_snapshots.volume_uuid -> ossea_volumes.volume_id",
    ];
    assert_eq!(found, wanted.map(String::from).into());
}

#[test]
fn each_foreign_key_rejects_from_both_ends() {
    let (_dir, conn) = filled();
    let other = vol(99);
    for sql in [
        "UPDATE vm_disks SET job_id = 99".to_owned(),
        "UPDATE vm_disks SET ossea_volume_id = 99".into(),
        format!("UPDATE device_mappings SET volume_uuid = '{other}'"),
        "UPDATE volume_operations SET job_id = 99".into(),
        format!("UPDATE volume_operations SET volume_uuid = '{other}'"),
        format!("UPDATE volume_snapshots SET volume_uuid = '{other}'"),
        "DELETE FROM jobs".into(),
        "DELETE FROM ossea_volumes".into(),
        "UPDATE jobs SET id = 99".into(),
        format!("UPDATE ossea_volumes SET volume_id = '{other}'"),
    ] {
        let e = conn.execute(&sql, []).unwrap_err().to_string();
        assert!(e.contains("FOREIGN KEY"), "{sql}: {e}");
    }
    for table in tables(&conn) {
        let rows: i64 = conn.query_row(&format!("SELECT count(*) FROM {table}"), [], |r| r.get(0)).unwrap();
        assert!(rows > 0, "{table} lost its row");
    }
    // Each parent is held by each of its children alone.
    for (child, parent) in [("vm_disks", "jobs"), ("volume_operations", "jobs"), ("vm_disks", "ossea_volumes")] {
        conn.execute_batch("SAVEPOINT s").unwrap();
        for table in ["vm_disks", "device_mappings", "volume_operations", "volume_snapshots"] {
            if table != child {
                conn.execute(&format!("DELETE FROM {table}"), []).unwrap();
            }
        }
        conn.execute(&format!("DELETE FROM {parent}"), []).unwrap_err();
        conn.execute_batch("ROLLBACK TO s; RELEASE s").unwrap();
    }
}

#[test]
fn every_table_is_strict_and_every_id_is_never_reused() {
    let (_dir, conn) = filled();
    let all = tables(&conn);
    assert_eq!(
        all,
        ["device_mappings", "jobs", "meta", "ossea_volumes", "vm_disks", "volume_operations", "volume_snapshots"]
    );
    let strict = strings(&conn, "SELECT name FROM pragma_table_list WHERE strict = 1 ORDER BY name");
    assert_eq!(strict, all);
    for table in all.iter().filter(|t| *t != "meta") {
        let sql: String =
            conn.query_row("SELECT sql FROM sqlite_schema WHERE name = ?1", [table], |r| r.get(0)).unwrap();
        assert!(sql.contains("INTEGER PRIMARY KEY AUTOINCREMENT"), "{table}");
    }
}

/// The predecessor named a disk's volume twice and a volume's device twice; each pair came apart.
#[test]
fn no_second_column_names_a_disks_volume_or_says_where_a_volume_is() {
    let (_dir, conn) = filled();
    let names: BTreeMap<String, BTreeSet<String>> = [
        // table, what in it may name a volume, a device or a machine
        ("device_mappings", "volume_uuid device_name dev_major dev_minor boot_id diskseq vm_id"),
        ("jobs", "vm_name vm_name_at"),
        ("meta", ""),
        ("ossea_volumes", "volume_id volume_name device_id"),
        ("vm_disks", "ossea_volume_id"),
        ("volume_operations", "volume_uuid host_id boot_id"),
        ("volume_snapshots", "volume_uuid"),
    ]
    .map(|(t, c)| (t.into(), c.split_whitespace().map(String::from).collect()))
    .into();
    let telling = ["vol", "uuid", "dev", "path", "seq", "boot", "host", "vm", "mount", "node", "attach"];
    for table in tables(&conn) {
        let found: BTreeSet<String> =
            columns(&conn, &table).into_iter().filter(|c| telling.iter().any(|t| c.contains(t))).collect();
        assert_eq!(found, names[&table], "{table}");
    }
    // And by what is in them: a volume's id or a device's name is where it may be, in no other column.
    for (table, allowed) in names {
        for column in columns(&conn, &table) {
            let hits: i64 = conn
                .query_row(
                    &format!(
                        "SELECT count(*) FROM {table} WHERE {column} LIKE '%' || ?1 || '%' OR {column} LIKE '%loop3%'"
                    ),
                    [vol(1).to_string()],
                    |r| r.get(0),
                )
                .unwrap();
            assert!(hits == 0 || allowed.contains(&column), "{table}.{column}");
        }
    }
}

#[test]
fn the_view_answers_the_validation_query() {
    let (_dir, conn) = filled();
    conn.execute_batch(&format!(
        "INSERT INTO ossea_volumes (volume_id, volume_name, size, status, status_at, added_at)
            VALUES ('{}', 'v2', 1, 'detached', 1, 1);
         INSERT INTO vm_disks (job_id, disk_name, ossea_volume_id, epoch, changed_at) VALUES (1, 'd1', 2, 2, 1)",
        vol(2)
    ))
    .unwrap();
    let mut rows = conn.prepare("SELECT * FROM job_volumes ORDER BY volume_id").unwrap();
    assert_eq!(rows.column_names(), ["job_id", "volume_id", "volume_name", "status", "device_path"]);
    let rows: Vec<[Option<String>; 5]> = rows
        .query_map([], |r| Ok([r.get(0)?, r.get(1)?, r.get(2)?, r.get(3)?, r.get(4)?]))
        .unwrap()
        .map(Result::unwrap)
        .collect();
    let row = |v, name: &str, status: &str, path: Option<&str>| {
        [Some("a".into()), Some(vol(v).to_string()), Some(name.into()), Some(status.into()), path.map(String::from)]
    };
    assert_eq!(rows, [row(1, "volume 1", "unknown", Some("/dev/loop3")), row(2, "v2", "detached", None)]);
}

#[test]
fn what_the_schema_cannot_mean_it_refuses() {
    let (_dir, conn) = filled();
    for sql in [
        "UPDATE jobs SET hold = 2",
        "UPDATE jobs SET name = '.hidden'",
        "UPDATE jobs SET name = 'a/b'",
        "UPDATE jobs SET name = ''",
        "UPDATE jobs SET created_at = 'yesterday'",
        "UPDATE ossea_volumes SET size = -1",
        "UPDATE ossea_volumes SET status = 'attaching'",
        "UPDATE ossea_volumes SET device_id = -1",
        "UPDATE vm_disks SET disk_name = 'a b'",
        "UPDATE vm_disks SET epoch = -1",
        "UPDATE device_mappings SET vm_id = 'x'",
        "UPDATE device_mappings SET device_name = NULL",
        "UPDATE device_mappings SET diskseq = NULL",
        "UPDATE device_mappings SET device_name = '/dev/loop3'",
        "UPDATE volume_operations SET verb = 'explode'",
        "UPDATE volume_operations SET outcome = 'done'",
        "UPDATE volume_operations SET ended_at = 1, outcome = 'fine', sentence = ''",
        "UPDATE volume_operations SET fence = ''",
        "INSERT INTO jobs (name, created_at, vm_name_at, hold_at) VALUES ('a', 1, 1, 1)",
    ] {
        conn.execute(sql, []).expect_err(sql);
    }
    conn.execute("UPDATE jobs SET name = 'Az-0._9'", []).unwrap();
}

#[test]
fn schema_md_names_every_column_and_no_other() {
    let (_dir, conn) = filled();
    let mut said: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut table = None;
    for line in include_str!("../../../../contrib/schema.md").lines() {
        if let Some(rest) = line.strip_prefix("## `") {
            let name = rest.split('`').next().unwrap().to_owned();
            assert!(said.insert(name.clone(), Vec::new()).is_none(), "{name} twice");
            table = Some(name);
        } else if let Some(rest) = line.strip_prefix("- `") {
            let (column, words) = rest.split_once("`: ").unwrap_or_else(|| panic!("no words: {line}"));
            assert!(words.len() > 5, "{line}");
            said.get_mut(table.as_ref().unwrap()).unwrap().push(column.to_owned());
        }
    }
    let mut real: BTreeMap<String, Vec<String>> = tables(&conn).into_iter().map(|t| (t, Vec::new())).collect();
    real.insert("job_volumes".into(), Vec::new());
    for (table, of) in &mut real {
        *of = columns(&conn, table);
    }
    assert_eq!(said, real);
}
