//! The client against a server that answers canned bytes. Everything logged meanwhile, and every
//! error, is searched for keys and signatures when a test's [`Bench`] is dropped.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::json;
use tracing_subscriber::util::SubscriberInitExt;

use super::*;

mod lists;
mod server;
mod tls;

use server::{Act, Server};

const KEY: &str = "CANARY-api-key-0123456789abcdef";
const SECRET: &str = "CANARY-secret-fedcba9876543210";
const LISTED: &str = r#"{"listvolumesresponse":{"count":0}}"#;
const JOB: &str = r#"{"attachvolumeresponse":{"jobid":"j"}}"#;
const BAD_SIGNATURE: &str = r#"{"listvolumesresponse":{"uuidList":[],"errorcode":401,"errortext":"unable to verify user credentials and/or request signature"}}"#;
const QUICK: Pace =
    Pace { first: Duration::from_millis(5), most: Duration::from_millis(40), signing: Duration::from_millis(5) };

/// What was printed, by whatever was logged and by errors that were shown.
#[derive(Clone, Default)]
struct Printed(Arc<Mutex<Vec<u8>>>);

impl io::Write for Printed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Printed {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock()).into_owned()
    }
}

struct Bench {
    server: Server,
    client: Client,
    printed: Printed,
    _listening: tracing::subscriber::DefaultGuard,
}

fn variables(endpoint: &str) -> Environment {
    let all: BTreeMap<&str, OsString> = [
        ("CLOUDSTACK_ENDPOINT", endpoint.into()),
        ("CLOUDSTACK_KEY", KEY.into()),
        ("CLOUDSTACK_SECRET", SECRET.into()),
    ]
    .into();
    Environment::from_fn(move |name| all.get(name).cloned())
}

fn options(endpoint: &str) -> ClientOptions {
    ClientOptions {
        signature: Signature::Sha1,
        timeout: Duration::from_secs(3),
        environment: variables(endpoint),
        ..ClientOptions::default()
    }
}

impl Bench {
    fn new(script: Vec<Act>) -> Self {
        Self::with(script, |_| {})
    }

    fn with(script: Vec<Act>, change: impl FnOnce(&mut ClientOptions)) -> Self {
        let printed = Printed::default();
        let writer = printed.clone();
        // For this thread alone, where the test's runtime runs; what uses `log` comes here, too.
        let listening = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::TRACE)
            .with_writer(move || writer.clone())
            .finish()
            .set_default();
        let server = Server::start(script);
        let mut options = options(&server.endpoint());
        change(&mut options);
        let client = Client::with_pace(options, QUICK).unwrap();
        Self { server, client, printed, _listening: listening }
    }

    async fn read(&self) -> Result<Value, ApiError> {
        self.shown(self.client.read("listVolumes", &[("name", "a b")]).await)
    }

    async fn write(&self) -> Result<Value, ApiError> {
        self.shown(self.client.write("attachVolume", &[("id", "v")]).await)
    }

    fn shown<T>(&self, result: Result<T, ApiError>) -> Result<T, ApiError> {
        if let Err(error) = &result {
            let text = format!("{error} {error:?} {:?}\n", self.client);
            self.printed.0.lock().extend_from_slice(text.as_bytes());
        }
        result
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        let printed = self.printed.text();
        let mut hidden = vec![KEY.to_owned(), SECRET.to_owned(), "signature=".into()];
        hidden.extend(self.server.requests().iter().filter_map(|form| form.get("signature").cloned()));
        for secret in hidden {
            let found = printed.lines().find(|line| line.to_lowercase().contains(&secret.to_lowercase()));
            assert!(found.is_none(), "{secret} was printed: {found:?}");
        }
    }
}

fn endpoint_of(options: &ClientOptions) -> String {
    Credentials::find(None, None, &options.environment).unwrap().endpoint().to_owned()
}

fn words(error: ApiError) -> String {
    error.to_string()
}

fn no_answer<T: std::fmt::Debug>(result: Result<T, ApiError>) -> String {
    match result.unwrap_err() {
        ApiError::NoAnswer { words } => words,
        other => panic!("{other:?}"),
    }
}

fn not_sent<T: std::fmt::Debug>(result: Result<T, ApiError>) -> String {
    match result.unwrap_err() {
        ApiError::NotSent { words } => words,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_call_is_a_signed_post_that_expires() {
    let b = Bench::new(vec![Act::json(200, r#"{"listvolumesresponse":{"count":1,"volume":[{"id":"v"}]}}"#)]);
    assert_eq!(b.read().await.unwrap()["volume"], json!([{"id": "v"}]));
    let form = b.server.requests().remove(0);
    let get = |name: &str| form.get(name).map(String::as_str).unwrap_or_default();
    assert_eq!((get("command"), get("name")), ("listVolumes", "a b"));
    assert_eq!((get("response"), get("signatureVersion"), get("apiKey")), ("json", "3", KEY));
    assert!(get("expires").ends_with("+0000"), "{}", get("expires"));
    let own: Vec<(&str, &str)> =
        form.iter().filter(|(n, _)| n.as_str() != "signature").map(|(n, v)| (n.as_str(), v.as_str())).collect();
    assert_eq!(get("signature"), sign::signature(&own, SECRET, Algorithm::Sha1));
    assert_eq!(b.server.lines(), ["POST /client/api HTTP/1.1"]);
    assert!(!b.server.heads()[0].to_lowercase().contains("cookie"));
}

#[tokio::test]
async fn what_is_logged_is_caught_by_the_canary() {
    let b = Bench::new(vec![Act::json(530, r#"{"r":{"errorcode":530,"errortext":"broken"}}"#)]);
    b.read().await.unwrap_err();
    // Ours, and what the libraries say by `log`.
    for text in ["CloudStack: broken", "starting new connection"] {
        assert!(b.printed.text().contains(text), "{text}: {}", b.printed.text());
    }
}

#[tokio::test]
async fn a_reset_is_no_answer_and_only_a_read_is_sent_again() {
    let b = Bench::new(vec![Act::Reset, Act::json(200, LISTED)]);
    b.read().await.unwrap();
    assert_eq!(b.server.requests().len(), 2);
    let b = Bench::new(vec![Act::Reset, Act::json(200, JOB)]);
    let words = no_answer(b.write().await);
    assert!(words.contains("attachVolume") && words.contains("reset"), "{words}");
    assert_eq!(b.server.requests().len(), 1);
}

#[tokio::test]
async fn half_a_body_is_no_answer() {
    for half in [Act::Half(r#"{"attachvolumeresponse":{"jobid":"#), Act::Cut(r#"{"attachvolumeresponse":{"jobid":"#)] {
        let b = Bench::new(vec![half.clone(), Act::json(200, JOB)]);
        no_answer(b.write().await);
        assert_eq!(b.server.requests().len(), 1);
        let b = Bench::new(vec![half, Act::json(200, LISTED)]);
        b.read().await.unwrap();
        assert_eq!(b.server.requests().len(), 2);
    }
}

#[tokio::test]
async fn a_proxys_page_is_no_answer() {
    let page = "<html><title>502 Bad Gateway</title></html>";
    let b = Bench::new(vec![Act::html(502, page), Act::json(200, JOB)]);
    assert!(no_answer(b.write().await).contains("502 Bad Gateway"));
    assert_eq!(b.server.requests().len(), 1);
    let b = Bench::new(vec![Act::html(502, page), Act::html(503, page), Act::json(200, LISTED)]);
    b.read().await.unwrap();
    assert_eq!(b.server.requests().len(), 3);
}

#[tokio::test]
async fn a_page_for_a_wrong_path_is_not_asked_for_again() {
    let b = Bench::new(vec![Act::html(404, "<html></html>")]);
    assert!(no_answer(b.read().await).contains("endpoint"));
    assert_eq!(b.server.requests().len(), 1);
}

#[tokio::test]
async fn a_401_that_passes_is_not_noticed() {
    let b = Bench::new(vec![Act::json(401, BAD_SIGNATURE), Act::json(200, JOB)]);
    b.write().await.unwrap();
    assert_eq!(b.server.requests().len(), 2);
}

#[tokio::test]
async fn a_401_that_stays_names_keys_and_clock() {
    let b = Bench::new(vec![Act::Dated(401, BAD_SIGNATURE, "Mon, 23 Nov 2026 01:02:03 GMT")]);
    let error = b.write().await.unwrap_err();
    assert!(matches!(error, ApiError::Credentials { .. }), "{error:?}");
    let words = words(error);
    for word in ["attachVolume", "keys from the environment", "clock here", "8 minutes", "23 Nov 2026 01:02:03"] {
        assert!(words.contains(word), "{word}: {words}");
    }
    assert_eq!(b.server.requests().len(), 4);
}

#[tokio::test]
async fn a_role_that_forbids_a_command_is_told_at_once() {
    let text = "The given command 'attachVolume' either does not exist, is not available for user.";
    let body = format!(r#"{{"r":{{"errorcode":401,"cserrorcode":9999,"errortext":"{text}"}}}}"#);
    let b = Bench::new(vec![Act::json(401, &body)]);
    let error = b.write().await.unwrap_err();
    assert_eq!(error, ApiError::Api { code: 401, cs: Some(9999), text: text.into() });
    assert_eq!(b.server.requests().len(), 1);
}

#[tokio::test]
async fn a_rate_limit_is_waited_for_by_all_calls() {
    let limit = r#"{"r":{"errorcode":429,"errortext":"The given user has reached his/her account api limit, please retry after [300] ms."}}"#;
    let b = Bench::new(vec![Act::json(429, limit), Act::json(200, LISTED)]);
    let begun = Instant::now();
    let first = b.client.write("attachVolume", &[]);
    let second = async {
        b.server.wait_for(1).await;
        // The refusal is on its way to the first caller; the gate closes with it.
        while b.client.0.gate.0.lock().is_none() {
            tokio::task::yield_now().await;
        }
        b.client.read("listVolumes", &[]).await
    };
    let (first, second) = tokio::join!(first, second);
    first.unwrap();
    second.unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(300));
    assert_eq!(b.server.requests().len(), 3);
    assert!(b.server.gap(0, 1) >= Duration::from_millis(290), "a call went through the closed gate");
}

#[tokio::test]
async fn a_rate_limit_beyond_the_deadline_is_told_at_once() {
    let limit = r#"{"r":{"errorcode":429,"errortext":"please retry after [50000] ms."}}"#;
    let b = Bench::new(vec![Act::json(429, limit)]);
    let begun = Instant::now();
    assert!(matches!(b.read().await.unwrap_err(), ApiError::Api { code: 429, .. }));
    assert!(begun.elapsed() < Duration::from_secs(2));
    assert!(not_sent(b.write().await).contains("rate limit"));
    assert_eq!(b.server.requests().len(), 1);
}

#[tokio::test]
async fn a_server_in_maintenance_is_asked_again_even_by_a_write() {
    let busy = r#"{"r":{"errorcode":503,"errortext":"A shutdown has been triggered"}}"#;
    let b = Bench::new(vec![Act::json(503, busy), Act::json(503, busy), Act::json(200, JOB)]);
    b.write().await.unwrap();
    assert_eq!(b.server.requests().len(), 3);
    // Long enough for four answers on a busy machine.
    let b = Bench::with(vec![Act::json(503, busy)], |o| o.timeout = Duration::from_secs(6));
    let error = b.write().await.unwrap_err();
    assert!(matches!(&error, ApiError::Api { code: 503, text, .. } if text.contains("shutdown")), "{error:?}");
    assert!(b.server.requests().len() > 3);
}

#[tokio::test]
async fn a_silent_server_is_no_answer_within_the_deadline() {
    let b = Bench::with(vec![Act::Silent], |o| o.timeout = Duration::from_millis(900));
    let begun = Instant::now();
    assert!(no_answer(b.read().await).contains("no answer within 0."));
    // Three where each try has its third; two on a machine too busy for that.
    assert!((2..=3).contains(&b.server.requests().len()), "{}", b.server.requests().len());
    assert!(begun.elapsed() < Duration::from_secs(3));
    let b = Bench::with(vec![Act::Silent], |o| o.timeout = Duration::from_millis(600));
    no_answer(b.write().await);
    assert_eq!(b.server.requests().len(), 1);
}

#[tokio::test]
async fn a_write_that_is_answered_late_has_all_the_time() {
    let b = Bench::with(vec![Act::Late(Duration::from_millis(700), JOB)], |o| o.timeout = Duration::from_millis(1800));
    b.write().await.unwrap();
    assert_eq!(b.server.requests().len(), 1);
}

#[tokio::test]
async fn a_refusal_of_the_cloud_is_not_asked_for_again() {
    let body = r#"{"r":{"uuidList":[],"errorcode":431,"cserrorcode":4350,"errortext":"no"}}"#;
    let b = Bench::new(vec![Act::json(431, body)]);
    let refused = ApiError::Api { code: 431, cs: Some(4350), text: "no".into() };
    assert_eq!(b.read().await.unwrap_err(), refused);
    assert_eq!(b.write().await.unwrap_err(), refused);
    assert_eq!(b.server.requests().len(), 2);
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    let other = Server::start(vec![Act::json(200, LISTED)]);
    let b = Bench::new(vec![Act::Redirect(302, format!("{}?x=1", other.endpoint()))]);
    let words = not_sent(b.write().await);
    assert!(words.contains(&other.endpoint()) && !words.contains("x=1"), "{words}");
    assert_eq!((b.server.requests().len(), other.requests().len()), (1, 0));
}

#[tokio::test]
async fn a_refused_connection_sent_nothing() {
    let b = Bench::new(Vec::new());
    let deaf = server::Deaf::new();
    let client = Client::with_pace(options(&deaf.endpoint()), QUICK).unwrap();
    for result in [client.read("listVolumes", &[]).await, client.write("attachVolume", &[]).await] {
        let words = not_sent(b.shown(result));
        assert!(words.contains("refused") && words.contains("3 tries"), "{words}");
    }
}

#[tokio::test]
async fn a_connection_that_is_never_made_sent_nothing() {
    let full = server::Full::new();
    let b = Bench::new(Vec::new());
    let mut o = options(&full.endpoint());
    o.timeout = Duration::from_millis(1200);
    let client = Client::with_pace(o, QUICK).unwrap();
    not_sent(b.shown(client.write("attachVolume", &[]).await));
}

#[tokio::test]
async fn a_name_that_is_unknown_sent_nothing() {
    let b = Bench::new(Vec::new());
    let client = Client::with_pace(options("http://no-such-host.invalid/client/api"), QUICK).unwrap();
    not_sent(b.shown(client.write("attachVolume", &[]).await));
}

#[tokio::test]
async fn a_body_without_end_is_given_up() {
    let b = Bench::with(vec![Act::Endless], |o| o.timeout = Duration::from_secs(60));
    assert!(no_answer(b.read().await).contains("64 MiB"));
    assert_eq!(b.server.requests().len(), 1);
}

#[tokio::test]
async fn reads_share_a_connection_and_its_end_is_no_error() {
    let b =
        Bench::new(vec![Act::json(200, LISTED), Act::json(200, LISTED), Act::Closing(LISTED), Act::json(200, LISTED)]);
    for _ in 0..3 {
        b.read().await.unwrap();
    }
    assert_eq!(b.server.connections(), 1);
    b.read().await.unwrap();
    assert_eq!((b.server.connections(), b.server.requests().len()), (2, 4));
}

#[tokio::test]
async fn a_write_never_meets_a_connection_that_the_server_is_closing() {
    let b = Bench::new(vec![Act::json(200, LISTED), Act::Closing(LISTED), Act::Closing(JOB), Act::json(200, JOB)]);
    b.read().await.unwrap();
    b.read().await.unwrap();
    b.write().await.unwrap();
    b.write().await.unwrap();
    assert_eq!((b.server.connections(), b.server.requests().len()), (3, 4));
}

#[tokio::test]
async fn what_a_proxy_repeats_of_a_request_is_hidden() {
    let b = Bench::new(vec![Act::Echo]);
    let words = no_answer(b.write().await);
    assert!(words.contains("HTML page (") && words.contains('…'), "{words}");
}

#[tokio::test]
async fn auto_asks_once_with_a_read_and_remembers() {
    let b = Bench::with(vec![Act::Signed(Algorithm::Sha1)], |o| o.signature = Signature::Auto);
    b.write().await.unwrap();
    b.write().await.unwrap();
    assert_eq!(b.server.commands(), ["listCapabilities", "attachVolume", "attachVolume"]);
    let b = Bench::with(vec![Act::Signed(Algorithm::Sha512)], |o| o.signature = Signature::Auto);
    let (one, two) = tokio::join!(b.write(), b.write());
    one.unwrap();
    two.unwrap();
    assert_eq!(b.server.commands(), ["listCapabilities", "listCapabilities", "attachVolume", "attachVolume"]);
}

#[tokio::test]
async fn a_write_is_not_ambiguous_for_an_unanswered_probe() {
    let b = Bench::with(vec![Act::Silent], |o| {
        o.signature = Signature::Auto;
        o.timeout = Duration::from_millis(600);
    });
    assert!(not_sent(b.write().await).contains("listCapabilities"));
    assert!(b.server.commands().iter().all(|c| c == "listCapabilities"));
}

#[tokio::test]
async fn keys_that_changed_are_used_without_a_restart() {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("keys");
    let write = |key: &str| {
        let mut file =
            std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path).unwrap();
        write!(file, "[cloudstack]\nkey = {key}\nsecret = {SECRET}\n").unwrap();
    };
    write("old");
    let b = Bench::with(vec![Act::json(200, LISTED)], |o| {
        o.endpoint = Some(endpoint_of(o));
        o.credentials = Some(path.clone());
        o.environment = Environment::empty();
    });
    b.read().await.unwrap();
    write(KEY);
    b.read().await.unwrap();
    std::fs::write(&path, "nonsense").unwrap();
    b.read().await.unwrap();
    let keys: Vec<String> = b.server.requests().iter().map(|form| form["apiKey"].clone()).collect();
    assert_eq!(keys, ["old", KEY, KEY]);
    assert!(b.printed.text().contains("stay as they were"), "{}", b.printed.text());
}
