use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;

use super::*;

const GOOD: &str = "[cloudstack]\nendpoint = https://c/client/api\nkey = kkk\nsecret = sss\n";

/// A directory for files of keys and a home.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a file that no one else can read.
    fn keys(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, text).unwrap();
        mode(&path, 0o600);
        path
    }
}

fn mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn variables(all: &[(&'static str, &str)]) -> Environment {
    let all: BTreeMap<&str, OsString> = all.iter().map(|(n, v)| (*n, v.into())).collect();
    Environment::from_fn(move |name| all.get(name).cloned())
}

fn dir(place: &Place) -> (&'static str, String) {
    ("CREDENTIALS_DIRECTORY", place.0.path().display().to_string())
}

const THREE: [(&str, &str); 3] =
    [("CLOUDSTACK_ENDPOINT", "https://e/client/api/"), ("CLOUDSTACK_KEY", "ek"), ("CLOUDSTACK_SECRET", "es")];

fn shown(c: &Credentials) -> (String, String, String) {
    let keys = c.keys();
    (c.endpoint().to_owned(), keys.api_key.expose().to_owned(), keys.secret.expose().to_owned())
}

fn three(endpoint: &str, key: &str, secret: &str) -> (String, String, String) {
    (endpoint.into(), key.into(), secret.into())
}

#[test]
fn each_source_alone_is_taken() {
    let place = Place::new();
    let c = Credentials::find(None, None, &variables(&THREE)).unwrap();
    assert_eq!(shown(&c), three("https://e/client/api", "ek", "es"));
    let path = place.keys("named", "endpoint = https://c/client/api\nkey = kkk\nsecret = sss\n");
    let c = Credentials::find(Some(&path), None, &Environment::empty()).unwrap();
    assert_eq!(shown(&c), three("https://c/client/api", "kkk", "sss"), "a file without sections");
    let path = place.keys("cloudstack", GOOD);
    // systemd shows the mask of an access list as the group's bits.
    mode(&path, 0o440);
    let (name, value) = dir(&place);
    let c = Credentials::find(None, None, &variables(&[(name, &value)])).unwrap();
    assert_eq!(shown(&c), three("https://c/client/api", "kkk", "sss"));
    assert!(c.source().contains("systemd"), "{}", c.source());
}

#[test]
fn two_sources_are_an_error_that_names_both() {
    let place = Place::new();
    let named = place.keys("named", GOOD);
    place.keys("cloudstack", GOOD);
    let (name, value) = dir(&place);
    let all: Vec<(&str, &str)> = THREE.into_iter().chain([(name, value.as_str())]).collect();
    for (file, environment, both) in [
        (Some(&named), variables(&THREE), ["CLOUDSTACK_KEY", "/named"]),
        (Some(&named), variables(&[(name, &value)]), ["systemd credential", "/named"]),
        (None, variables(&all), ["CLOUDSTACK_KEY", "systemd credential"]),
    ] {
        let words = Credentials::find(file.map(PathBuf::as_path), None, &environment).unwrap_err();
        assert!(both.iter().all(|b| words.contains(b)), "{words}");
        assert!(!words.contains("ek") && !words.contains("sss"), "{words}");
    }
}

#[test]
fn two_endpoints_are_an_error_that_names_both() {
    let words = Credentials::find(None, Some("https://other/client/api"), &variables(&THREE)).unwrap_err();
    assert!(words.contains("https://other/") && words.contains("https://e/"), "{words}");
    Credentials::find(None, Some("https://e/client/api"), &variables(&THREE)).unwrap();
    let place = Place::new();
    let path = place.keys("k", "key = a\nsecret = b\n");
    let words = Credentials::find(Some(&path), None, &Environment::empty()).unwrap_err();
    assert!(words.contains("no CloudStack endpoint"), "{words}");
}

#[test]
fn a_part_of_the_variables_is_an_error() {
    let words = Credentials::find(None, None, &variables(&THREE[..2])).unwrap_err();
    assert!(words.contains("but not CLOUDSTACK_SECRET"), "{words}");
    let empty = [THREE[0], THREE[1], ("CLOUDSTACK_SECRET", "")];
    Credentials::find(None, None, &variables(&empty)).unwrap_err();
}

#[test]
fn the_files_of_cs_are_the_last_resort() {
    let place = Place::new();
    let home = place.0.path().display().to_string();
    let words = Credentials::find(None, None, &variables(&[("HOME", &home)])).unwrap_err();
    assert!(words.contains("there are no CloudStack keys"), "{words}");
    place.keys(
        ".cloudstack.ini",
        "[cloudstack]\nendpoint=https://h\nkey=hk\nsecret=hs\ntimeout=10\n[b]\nendpoint=https://b\nkey=bk\nsecret=bs\n",
    );
    let c = Credentials::find(None, None, &variables(&[("HOME", &home)])).unwrap();
    assert_eq!(shown(&c), three("https://h", "hk", "hs"));
    let c = Credentials::find(None, None, &variables(&[("HOME", &home), ("CLOUDSTACK_REGION", "b")])).unwrap();
    assert_eq!(shown(&c), three("https://b", "bk", "bs"));
    let words = Credentials::find(None, None, &variables(&[("HOME", &home), ("CLOUDSTACK_REGION", "x")])).unwrap_err();
    assert!(words.contains("[x]"), "{words}");
    let other = place.keys("other.ini", GOOD).display().to_string();
    let c = Credentials::find(None, None, &variables(&[("HOME", &home), ("CLOUDSTACK_CONFIG", &other)])).unwrap();
    assert_eq!(shown(&c), three("https://c/client/api", "kkk", "sss"));
    // Any of the others comes before it.
    let named = place.keys("named", GOOD);
    let c = Credentials::find(Some(&named), None, &variables(&[("HOME", &home)])).unwrap();
    assert!(c.source().contains("named in the configuration"), "{}", c.source());
}

#[test]
fn a_file_that_others_can_read_is_refused_with_the_cure() {
    let place = Place::new();
    let path = place.keys("k", GOOD);
    for bits in [0o640, 0o604, 0o620, 0o601] {
        mode(&path, bits);
        let words = Credentials::find(Some(&path), None, &Environment::empty()).unwrap_err();
        assert!(words.contains(&format!("chmod 600 {}", path.display())), "{words}");
    }
    mode(&path, 0o400);
    Credentials::find(Some(&path), None, &Environment::empty()).unwrap();
}

#[test]
fn a_file_of_another_user_is_refused() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIP: a file of another user needs root");
        return;
    }
    let place = Place::new();
    let path = place.keys("k", GOOD);
    std::os::unix::fs::chown(&path, Some(65_534), None).unwrap();
    let words = Credentials::find(Some(&path), None, &Environment::empty()).unwrap_err();
    assert!(words.contains("user 65534") && words.contains("chown root"), "{words}");
}

#[test]
fn what_is_no_file_of_keys_is_said_without_its_content() {
    let place = Place::new();
    let find = |path: &Path| Credentials::find(Some(path), None, &Environment::empty()).unwrap_err();
    for (text, word) in [
        ("", "no key"),
        ("[other]\nkey = a\n", "no section [cloudstack]"),
        ("[cloudstack]\nkey = a\n[x]\nsecret = zzz\n", "no secret"),
        ("[cloudstack]\nkey = a\nsecret =\n", "secret is empty"),
        ("[cloudstack]\nkey = a\nsecret = zzz zzz\n", "blank"),
        ("[cloudstack]\nkey = a\nKEY = zzz\n", "line 3 gives key a second time"),
        ("[cloudstack]\nkey = a\nsecret = zzz\n[cloudstack]\nkey = zzz\n", "twice"),
        ("[cloudstack]\nzzz\n", "line 2 is neither"),
        ("[cloudstack]\n[x\n", "line 2: a section"),
    ] {
        let words = find(&place.keys("k", text));
        assert!(words.contains(word) && !words.contains("zzz"), "{text:?}: {words}");
    }
    std::fs::write(place.path("k"), [0xff, 0xfe]).unwrap();
    assert!(find(&place.path("k")).contains("UTF-8"));
    assert!(find(&place.keys("k", &"x".repeat(100_000))).contains("too many"));
    assert!(find(&place.path("none")).contains("cannot be read"));
    assert!(find(place.0.path()).contains("no regular file"));
    // Opened like a file, it would hang.
    let fifo = place.path("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
    assert!(find(&fifo).contains("no regular file"));
}

#[test]
fn an_ini_file_is_read_as_python_reads_it() {
    let text =
        "# c\n; c\n[a]\nkey=1\n[ cloudstack ]\nEndPoint: https://c\n key = a;b#c\r\nsecret = a=b:c\nmethod = post\n";
    let found = parse(text, "cloudstack", false).unwrap();
    assert_eq!((found.endpoint.as_deref(), found.keys.api_key.expose()), (Some("https://c"), "a;b#c"));
    assert_eq!(found.keys.secret.expose(), "a=b:c");
}

#[test]
fn new_keys_are_used_and_broken_ones_are_not() {
    let place = Place::new();
    let path = place.keys("k", GOOD);
    let c = Credentials::find(Some(&path), None, &Environment::empty()).unwrap();
    // Replaced as editors do: another inode.
    let next = place.keys("next", &GOOD.replace("sss", "ttt"));
    std::fs::rename(&next, &path).unwrap();
    assert_eq!(c.keys().secret.expose(), "ttt");
    // Written in place, the same length within the same tick of the clock.
    std::fs::write(&path, GOOD.replace("sss", "uuu")).unwrap();
    assert_eq!(c.keys().secret.expose(), "uuu");
    assert_eq!(c.trouble(), None);
    for broken in ["", "[cloudstack]\nkey = v\n", "[cloudstack]\nendpoint = https://other\nkey = v\nsecret = v\n"] {
        std::fs::write(&path, broken).unwrap();
        assert_eq!(c.keys().secret.expose(), "uuu");
        assert!(c.trouble().is_some(), "{broken}");
    }
    assert!(c.trouble().unwrap().contains("restart"), "{:?}", c.trouble());
    std::fs::write(&path, GOOD.replace("sss", "vvv")).unwrap();
    mode(&path, 0o644);
    assert_eq!(c.keys().secret.expose(), "uuu");
    assert!(c.trouble().unwrap().contains("chmod 600"));
    // A chmod alone cures it.
    mode(&path, 0o600);
    assert_eq!((c.keys().secret.expose(), c.trouble()), ("vvv", None));
    std::fs::remove_file(&path).unwrap();
    assert_eq!(c.keys().secret.expose(), "vvv");
    assert!(c.trouble().is_some());
}

#[test]
fn a_file_that_did_not_change_is_not_read() {
    let place = Place::new();
    let path = place.keys("k", GOOD);
    // Old enough to be believed by its times.
    let past = SystemTime::now() - Duration::from_secs(60);
    File::open(&path).unwrap().set_modified(past).unwrap();
    let c = Credentials::find(Some(&path), None, &Environment::empty()).unwrap();
    let first = c.state.lock().stamp;
    assert!(first.is_some());
    assert!(Arc::ptr_eq(&c.keys(), &c.keys()));
    assert_eq!(c.state.lock().stamp, first);
    File::open(&path).unwrap().set_modified(past - Duration::from_secs(1)).unwrap();
    c.keys();
    assert_ne!(c.state.lock().stamp, first, "another time was not noticed");
}

#[test]
fn credentials_show_no_secret() {
    let c = Credentials::find(None, None, &variables(&THREE)).unwrap();
    let text = format!("{c:?} {:?} {}", variables(&THREE), c.source());
    assert!(!text.contains("ek\"") && !text.contains("es\"") && text.contains("hidden"), "{text}");
}
