use super::*;

fn config(args: &[&str]) -> Result<(Cli, Config), Problem> {
    Cli::from_args(std::iter::once("volfs").chain(args.iter().copied()).map(OsString::from))
}

fn with_file(text: &str, args: &[&str]) -> Result<Config, Problem> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    let path = file.path().display().to_string();
    let mut all = vec!["--config", &path];
    all.extend(args);
    config(&all).map(|(_, c)| c)
}

fn source(config: &Config, name: &str) -> Source {
    config.settings.iter().find(|s| s.name == name).unwrap().source.clone()
}

#[test]
fn defaults_are_those_of_the_contract() {
    let c = with_file("", &["mount"]).unwrap();
    assert_eq!(c.mountpoint, Path::new("/run/volfs").to_owned());
    assert_eq!(c.state_dir, Path::new("/var/lib/volfs"));
    assert_eq!(c.loop_provider.dir, Path::new("/var/lib/volfs/loop"));
    assert_eq!(c.loop_provider.trash_keep, Duration::from_secs(604_800));
    assert_eq!(c.reconcile_interval, Duration::from_secs(30));
    assert_eq!((c.provider, c.size_check, c.read_only), (Provider::Loop, SizeCheck::Exact, false));
    assert_eq!(c.export_name.template(), "{uuid}");
    assert!(c.settings.iter().all(|s| s.source == Source::Default));
}

#[test]
fn a_flag_beats_the_file_and_check_can_say_so() {
    let c = with_file(
        "state_dir = \"/from/file\"\nlog = \"debug\"\nread_only = true\n",
        &["check", "--state-dir", "/from/flag", "--read-only=false"],
    )
    .unwrap();
    assert_eq!(c.state_dir, Path::new("/from/flag"));
    assert_eq!(c.loop_provider.dir, Path::new("/from/flag/loop"));
    assert!(!c.read_only);
    assert_eq!(c.log, "debug");
    assert_eq!(source(&c, "state_dir"), Source::Flag);
    assert_eq!(source(&c, "log"), Source::File(c.file.clone().unwrap()));
    assert_eq!(source(&c, "group"), Source::Default);
}

#[test]
fn options_stand_before_or_after_the_subcommand() {
    assert!(config(&["--read-only", "mount", "/x/y"]).unwrap().1.read_only);
    let (cli, c) = config(&["mount", "/x/y", "--read-only", "--background"]).unwrap();
    assert!(c.read_only);
    assert_eq!(c.mountpoint, Path::new("/x/y"));
    assert!(matches!(cli.command, Subcommand::Mount { background: true, .. }));
}

#[test]
fn a_file_that_was_named_must_exist() {
    let words = config(&["mount", "--config", "/no/such.toml"]).unwrap_err().to_string();
    assert!(words.contains("/no/such.toml"), "{words}");
    let words = with_file("\nstate = 3\n", &["mount"]).unwrap_err().to_string();
    assert!(words.contains(":2: ") && words.contains("state"), "{words}");
}

#[test]
fn a_directory_of_ours_below_the_mount_point_is_refused() {
    for args in [
        ["mount", "/x/y", "--state-dir", "/x/y/state"],
        ["mount", "/x/y", "--state-dir", "/x/y"],
        ["mount", "/x/y", "--log-file", "/x/y/log"],
    ] {
        let words = config(&args).unwrap_err().to_string();
        assert!(words.contains("mount point"), "{words}");
    }
    with_file("[loop]\ndir = \"/x/y/z\"", &["mount", "/x/y"]).unwrap_err();
    config(&["mount", "/x/y", "--state-dir", "/x/y2"]).unwrap();
    config(&["mount", "/"]).unwrap_err();
}

#[test]
fn the_cloud_is_described_by_its_own_table() {
    let text = r#"
        provider = "cloudstack"
        [cloudstack]
        endpoint = "https://cloud.example:8443/client/api"
        credentials = "/etc/volfs/keys"
        ca = "/etc/volfs/ca.pem"
        signature = "sha512"
        zone = "Zone 1"
        offering = "2aff4799-1111-4222-8333-444455556666"
        project = "3aff4799-1111-4222-8333-444455556666"
        host = "4aff4799-1111-4222-8333-444455556666"
        most_disks = 13
        recoverable_for = 3600
        timeout = 60
        late_answers = 90
    "#;
    let c = with_file(text, &["mount"]).unwrap();
    assert_eq!(c.provider, Provider::Cloudstack);
    let wanted = CloudStackConfig {
        endpoint: Some("https://cloud.example:8443/client/api".into()),
        credentials: Some("/etc/volfs/keys".into()),
        ca: Some("/etc/volfs/ca.pem".into()),
        signature: SignatureHash::Sha512,
        zone: Some("Zone 1".into()),
        offering: Some("2aff4799-1111-4222-8333-444455556666".into()),
        project: Some("3aff4799-1111-4222-8333-444455556666".into()),
        host: Some(crate::model::VmId::parse("4aff4799-1111-4222-8333-444455556666").unwrap()),
        most_disks: 13,
        recoverable_for: Duration::from_secs(3600),
        timeout: Duration::from_secs(60),
        late_answers: Duration::from_secs(90),
    };
    assert_eq!(c.cloudstack, wanted);
    let file = Source::File(c.file.clone().unwrap());
    let of_table: Vec<&Setting> = c.settings.iter().filter(|s| s.name.starts_with("cloudstack.")).collect();
    assert_eq!(of_table.len(), 12, "each key has its line in check: {of_table:?}");
    assert!(of_table.iter().all(|s| s.source == file), "{of_table:?}");
}

#[test]
fn the_cloud_needs_no_key_of_its_table() {
    let c = config(&["mount", "--provider", "cloudstack"]).unwrap().1;
    assert_eq!((c.provider, c.cloudstack.signature), (Provider::Cloudstack, SignatureHash::Auto));
    assert_eq!((c.cloudstack.endpoint, c.cloudstack.credentials, c.cloudstack.host), (None, None, None));
    assert_eq!(c.cloudstack.most_disks, 32);
    assert_eq!(c.cloudstack.recoverable_for, Duration::from_secs(86_400));
    assert_eq!(c.cloudstack.timeout, Duration::from_secs(30));
    let of_table: Vec<&Setting> = c.settings.iter().filter(|s| s.name.starts_with("cloudstack.")).collect();
    assert_eq!(of_table.len(), 12);
    assert!(of_table.iter().all(|s| s.source == Source::Default && !s.value.is_empty()), "{of_table:?}");
}

#[test]
fn the_table_of_a_provider_that_is_not_used_is_checked_and_let_be() {
    let c = with_file("[cloudstack]\nzone = \"z\"\n", &["mount"]).unwrap();
    assert_eq!(c.provider, Provider::Loop);
    let names: Vec<&str> = c.settings.iter().map(|s| s.name).filter(|n| n.starts_with("cloudstack.")).collect();
    assert_eq!(names, ["cloudstack.zone"]);
    with_file("[cloudstack]\nzon = \"z\"\n", &["mount"]).unwrap_err();
}

#[test]
fn keys_below_the_mount_point_are_refused() {
    for key in ["credentials", "ca"] {
        let words = with_file(&format!("[cloudstack]\n{key} = \"/x/y/z\""), &["mount", "/x/y"]).unwrap_err();
        assert!(words.to_string().contains(&format!("cloudstack.{key} /x/y/z")), "{words}");
    }
}

#[test]
fn a_mount_point_is_named_as_the_kernel_names_it() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("real")).unwrap();
    std::os::unix::fs::symlink("real", dir.path().join("link")).unwrap();
    let real = dir.path().canonicalize().unwrap().join("real/m");
    assert_eq!(mountpoint_path(&dir.path().join("link/m")).unwrap(), real);
}

#[test]
fn a_group_is_found_by_name_or_number() {
    let groups = parse_groups("root:x:0:\nvolfs:x:991:a,b\nbroken\nodd:x:no:\nvolfs:x:5:\n");
    assert_eq!(groups.get("volfs"), Some(&991));
    assert_eq!(groups.len(), 2);
    assert_eq!(find_group("root").unwrap().gid, 0);
    assert_eq!(find_group("4711").unwrap().gid, 4711);
    assert!(find_group("no-such-group").unwrap_err().to_string().contains("no-such-group"));
}

#[test]
fn an_unusable_log_filter_is_an_error_at_start() {
    assert!(config(&["mount", "--log", "volfs=nonsense"]).unwrap_err().to_string().contains("log filter"));
}

#[test]
fn an_export_name_is_unique_and_a_file_name() {
    assert_eq!(ExportName::parse("vol-{uuid}.raw").unwrap().template(), "vol-{uuid}.raw");
    let long = format!("{{uuid}}{}", "x".repeat(195));
    for bad in
        ["", "x", "{disk}", "{uuid}/x", ".{uuid}", "{uuid}{", "{uuid}{uuid}", "{uuid}\n", "a {uuid}", "ä{uuid}", &long]
    {
        assert!(ExportName::parse(bad).is_err(), "{bad}");
    }
}

#[test]
fn the_command_line_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn any_file_is_a_configuration_or_words_that_name_it() {
    crate::fuzz::fuzz("config", 500, |bytes| {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        let path = file.path().display().to_string();
        match config(&["--config", &path, "mount"]) {
            Ok((_, config)) => {
                assert!(config.reconcile_interval >= Duration::from_secs(1) && config.mountpoint.is_absolute());
                assert!(config.settings.iter().all(|s| !s.value.contains('\n')), "{:?}", config.settings);
                true
            }
            Err(problem) => {
                assert!(!problem.to_string().is_empty());
                false
            }
        }
    });
}
