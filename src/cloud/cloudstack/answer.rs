//! An HTTP reply as a value, or as what went wrong (page 1.5): pure.
//!
//! The body decides, the HTTP status comes second: proxies answer with the same numbers as the
//! cloud, but not with its envelopes.

use std::time::Duration;

use serde_json::Value;

/// Most bytes of a foreign text that are shown.
const SHOWN: usize = 1000;
/// The wait after a 429 that names none: the server's default window (page 1.8).
const LIMIT_WAIT: Duration = Duration::from_secs(1);
/// Most of a wait that a 429 may ask for.
const LIMIT_WAIT_MOST: Duration = Duration::from_secs(60);

/// Why a call has no result. The kind says what is known of its effect.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    /// The cloud said no, in an envelope of its own.
    #[error("{text} (CloudStack {code}{})", cs.map(|n| format!("/{n}")).unwrap_or_default())]
    Api {
        /// `errorcode`, or the HTTP status where it is missing.
        code: u16,
        /// `cserrorcode`, the class of the exception.
        cs: Option<u32>,
        /// `errortext`, control characters replaced.
        text: String,
    },
    /// The cloud does not take our signature, after several tries with fresh ones. Nothing was done.
    #[error("{words}")]
    Credentials {
        /// What to look at: keys and clock, by name.
        words: String,
    },
    /// The request did not reach the cloud: nothing was done.
    #[error("{words}")]
    NotSent {
        /// What was tried, and why it failed.
        words: String,
    },
    /// The request was sent, and no complete valid answer came: it may or may not have been done.
    #[error("{words}")]
    NoAnswer {
        /// What was tried, and what came instead of an answer.
        words: String,
    },
}

impl ApiError {
    /// The same kind with other words.
    pub(super) fn with_words(self, change: impl FnOnce(String) -> String) -> Self {
        match self {
            ApiError::Api { code, cs, text } => ApiError::Api { code, cs, text: change(text) },
            ApiError::Credentials { words } => ApiError::Credentials { words: change(words) },
            ApiError::NotSent { words } => ApiError::NotSent { words: change(words) },
            ApiError::NoAnswer { words } => ApiError::NoAnswer { words: change(words) },
        }
    }
}

/// What may be done about a failed try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Again {
    /// It would fail again.
    Never,
    /// There was no time left for a try: what failed before it says more.
    Late,
    /// With keys read again and a fresh signature.
    Keys,
    /// All calls wait so long first: the account's rate limit.
    After(Duration),
    /// Nothing was connected: a few times.
    Connect,
    /// Nothing was started: until the deadline.
    Clean,
    /// It may have been done: only what may be done twice.
    Lost,
}

/// One try's failure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    pub error: ApiError,
    pub again: Again,
}

impl Failure {
    pub(super) fn no_answer(words: impl Into<String>, again: Again) -> Self {
        Self { error: ApiError::NoAnswer { words: words.into() }, again }
    }

    pub(super) fn not_sent(words: impl Into<String>, again: Again) -> Self {
        Self { error: ApiError::NotSent { words: words.into() }, again }
    }
}

/// An HTTP reply, complete.
#[derive(Debug, Clone, Default)]
pub(super) struct Reply {
    /// The HTTP status.
    pub status: u16,
    /// `Location`, without what follows a `?`.
    pub location: Option<String>,
    /// `Date`, which most servers leave out (page 1.3).
    pub date: Option<String>,
    /// The body.
    pub body: Vec<u8>,
}

/// Whether an answer says that it worked: `success` has been a boolean and a text over versions.
pub fn success(answer: &Value) -> bool {
    match answer.get("success") {
        Some(Value::Bool(yes)) => *yes,
        Some(Value::String(text)) => text.eq_ignore_ascii_case("true"),
        _ => false,
    }
}

/// Text of others as one line of bounded length.
pub(super) fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len().min(SHOWN));
    for word in text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|w| !w.is_empty()) {
        if out.len() + word.len() > SHOWN {
            out.push_str(" …");
            break;
        }
        if !out.is_empty() {
            out.push(' ');
        }
        out.push_str(word);
    }
    out
}

/// The object inside the one key, or what went wrong.
pub(super) fn read(reply: Reply) -> Result<Value, Failure> {
    let status = reply.status;
    if (300..400).contains(&status) {
        return Err(redirect(status, reply.location.as_deref()));
    }
    let top = match serde_json::from_slice::<Value>(&reply.body) {
        Ok(Value::Object(top)) => top,
        Ok(_) => return Err(foreign(status, "JSON that is no object")),
        Err(e) => return Err(foreign(status, &not_json(&reply.body, &e))),
    };
    drop(reply);
    // The key is mostly the command's name, but not always: only its shape tells.
    let mut inner: Vec<Value> = top.into_iter().map(|(_, v)| v).filter(Value::is_object).collect();
    let answer = match (inner.pop(), inner.is_empty()) {
        (Some(answer), true) => answer,
        _ => return Err(foreign(status, "JSON that is no answer of CloudStack")),
    };
    if answer.get("errorcode").is_some() || answer.get("errortext").is_some() {
        return Err(refusal(status, &answer));
    }
    match status {
        200..300 => Ok(answer),
        _ => Err(foreign(status, "JSON that is no answer of CloudStack")),
    }
}

/// CloudStack's API never redirects: something before it did, and a POST must not become a GET.
fn redirect(status: u16, location: Option<&str>) -> Failure {
    let place = location.map_or_else(|| "without naming a place".into(), |l| format!("to {}", plain(l)));
    let words = format!(
        "it answered with a redirect (HTTP {status}) {place}, which is not followed: \
         set the endpoint to the place where the API itself is"
    );
    match status {
        301 | 302 | 307 | 308 => Failure::not_sent(words, Again::Never),
        _ => Failure::no_answer(words, Again::Never),
    }
}

fn foreign(status: u16, what: &str) -> Failure {
    let words = format!("it answered HTTP {status} with {what}");
    match status {
        408 | 425 | 429 => Failure::no_answer(words, Again::Lost),
        400..500 => Failure::no_answer(format!("{words}: is the endpoint the API's own address?"), Again::Never),
        _ => Failure::no_answer(words, Again::Lost),
    }
}

fn not_json(body: &[u8], error: &serde_json::Error) -> String {
    let text = String::from_utf8_lossy(body);
    let text = text.trim_start();
    if text.is_empty() {
        return "an empty body".into();
    }
    if text.starts_with("<?xml") {
        return "XML: something on the way dropped response=json".into();
    }
    if text.starts_with('<') {
        return match title(text) {
            Some(title) => format!("an HTML page ({title}): a proxy, or a server that is starting"),
            None => "an HTML page: a proxy, or a server that is starting".into(),
        };
    }
    if error.is_eof() {
        return format!("JSON that ends after {} bytes: cut on the way", body.len());
    }
    "something that is not JSON".into()
}

fn title(html: &str) -> Option<String> {
    let lower = html.to_ascii_lowercase();
    let start = lower.find("<title>")? + "<title>".len();
    let end = start + lower.get(start..)?.find('<')?;
    let words = plain(html.get(start..end)?);
    (!words.is_empty()).then_some(words)
}

fn number(answer: &Value, key: &str) -> Option<u64> {
    let value = answer.get(key)?;
    value.as_u64().or_else(|| value.as_str()?.trim().parse().ok())
}

fn refusal(status: u16, answer: &Value) -> Failure {
    let code = number(answer, "errorcode").and_then(|n| u16::try_from(n).ok()).unwrap_or(status);
    let cs = number(answer, "cserrorcode").and_then(|n| u32::try_from(n).ok());
    let text = answer.get("errortext").and_then(Value::as_str).map(plain).unwrap_or_default();
    let text = if text.is_empty() { "no reason was given".into() } else { text };
    let again = match code {
        // The role's answer comes before the signature is looked at: keys and clock are not it (page 1.7).
        401 if text.contains("The given command") => Again::Never,
        401 => Again::Keys,
        429 => Again::After(limit_wait(&text)),
        503 => Again::Clean,
        _ => Again::Never,
    };
    Failure { error: ApiError::Api { code, cs, text }, again }
}

/// `… please retry after [N] ms.`: the number is in the text alone (page 1.8).
fn limit_wait(text: &str) -> Duration {
    let number = || {
        let rest = text.get(text.to_ascii_lowercase().find("retry after")?..)?;
        let digits: String =
            rest.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).collect();
        digits.parse().ok()
    };
    number().map_or(LIMIT_WAIT, |ms| Duration::from_millis(ms).min(LIMIT_WAIT_MOST))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn got(status: u16, body: &str) -> Result<Value, Failure> {
        read(Reply { status, body: body.into(), ..Reply::default() })
    }

    fn api(code: u16, cs: Option<u32>, text: &str) -> ApiError {
        ApiError::Api { code, cs, text: text.into() }
    }

    #[test]
    fn the_object_inside_the_one_key_is_the_answer_whatever_its_name() {
        for body in [
            r#"{"listvolumesresponse":{"count":1}}"#,
            r#"{"odd":{"count":1}}"#,
            r#"{"cloud-stack-version":"4.11.3","listvolumesresponse":{"count":1}}"#,
        ] {
            assert_eq!(got(200, body).unwrap()["count"], 1, "{body}");
        }
        assert_eq!(got(200, r#"{"listvolumesresponse":{}}"#).unwrap(), serde_json::json!({}));
    }

    #[test]
    fn an_envelope_decides_before_the_status() {
        let body =
            r#"{"attachvolumeresponse":{"uuidList":[],"errorcode":431,"cserrorcode":4350,"errortext":"a\nb\u0007"}}"#;
        for status in [200, 431, 500] {
            let failure = got(status, body).unwrap_err();
            assert_eq!(failure.error, api(431, Some(4350), "a b"), "{status}");
            assert_eq!(failure.again, Again::Never);
        }
        assert_eq!(got(530, r#"{"errorresponse":{"errortext":"x"}}"#).unwrap_err().error, api(530, None, "x"));
        let text = got(431, r#"{"x":{"errorcode":"431","cserrorcode":"9999"}}"#).unwrap_err().error;
        assert_eq!(text, api(431, Some(9999), "no reason was given"));
        let odd = got(531, r#"{"x":{"errorcode":99999999,"errortext":7}}"#).unwrap_err().error;
        assert_eq!(odd, api(531, None, "no reason was given"));
    }

    #[test]
    fn what_may_be_done_again_follows_from_the_code() {
        let again = |code: u16, text: &str| {
            got(code, &format!(r#"{{"r":{{"errorcode":{code},"errortext":"{text}"}}}}"#)).unwrap_err().again
        };
        assert_eq!(again(401, "unable to verify user credentials and/or request signature"), Again::Keys);
        assert_eq!(again(401, "The given command 'x' either does not exist, is not available"), Again::Never);
        assert_eq!(again(503, "maintenance"), Again::Clean);
        assert_eq!(again(530, "internal"), Again::Never);
        let after = |text: &str| again(429, text);
        assert_eq!(after("limit, please retry after [340] ms."), Again::After(Duration::from_millis(340)));
        assert_eq!(after("limit"), Again::After(LIMIT_WAIT));
        assert_eq!(after("retry after [99999999999999999999] ms"), Again::After(LIMIT_WAIT));
        assert_eq!(after("retry after [999999999] ms"), Again::After(LIMIT_WAIT_MOST));
    }

    #[test]
    fn a_proxys_words_are_not_the_clouds() {
        for (status, body, word, again) in [
            (502, "<html><TITLE>502 Bad\nGateway</TITLE></html>", "HTML page (502 Bad Gateway)", Again::Lost),
            (503, " <!doctype html>", "HTML page", Again::Lost),
            (404, "<html></html>", "endpoint", Again::Never),
            (429, "<html></html>", "HTML", Again::Lost),
            (200, "", "empty", Again::Lost),
            (200, "<?xml version=\"1.0\"?><a/>", "response=json", Again::Lost),
            (200, r#"{"listvolumesresponse":{"count":1"#, "ends after 33 bytes", Again::Lost),
            (200, "ok", "not JSON", Again::Lost),
            (200, "[]", "no object", Again::Lost),
            (200, "{}", "no answer of CloudStack", Again::Lost),
            (200, r#"{"a":{},"b":{}}"#, "no answer of CloudStack", Again::Lost),
            (503, r#"{"error":{"message":"x"}}"#, "no answer of CloudStack", Again::Lost),
            (200, "<title>", "HTML", Again::Lost),
        ] {
            let Failure { error: ApiError::NoAnswer { words }, again: is } = got(status, body).unwrap_err() else {
                panic!("{body} is another kind")
            };
            assert!(words.contains(word), "{body}: {words}");
            assert_eq!(is, again, "{body}");
        }
    }

    #[test]
    fn a_redirect_names_the_place() {
        let reply = |status| Reply { status, location: Some("https://b/api".into()), ..Reply::default() };
        for status in [301, 302, 307, 308] {
            let error = read(reply(status)).unwrap_err().error;
            assert!(matches!(&error, ApiError::NotSent { words } if words.contains("https://b/api")), "{error:?}");
        }
        assert!(matches!(read(reply(303)).unwrap_err().error, ApiError::NoAnswer { .. }));
    }

    #[test]
    fn big_numbers_keep_their_digits_and_bytes_that_are_no_text_do_no_harm() {
        let answer = got(200, r#"{"r":{"size":9007199254740993,"most":18446744073709551615}}"#).unwrap();
        assert_eq!(answer["size"].as_u64(), Some(9_007_199_254_740_993));
        assert_eq!(answer["most"].as_u64(), Some(u64::MAX));
        let body = [b'<', 0xff, 0xfe, b'<', b't'].to_vec();
        assert!(read(Reply { status: 200, body, ..Reply::default() }).is_err());
        assert!(got(200, &"[".repeat(100_000)).is_err());
    }

    #[test]
    fn success_is_a_boolean_or_a_text() {
        for (text, is) in [
            (r#"{"success":true}"#, true),
            (r#"{"success":"true"}"#, true),
            (r#"{"success":"false"}"#, false),
            (r#"{"success":false}"#, false),
            ("{}", false),
        ] {
            assert_eq!(success(&serde_json::from_str(text).unwrap()), is, "{text}");
        }
    }

    #[test]
    fn foreign_text_is_one_line_of_bounded_length() {
        let long = plain(&"word ".repeat(1000));
        assert!(long.len() <= SHOWN + 4 && long.ends_with('…'), "{}", long.len());
        assert!(plain(&"x".repeat(5000)).len() <= SHOWN + 4);
        assert_eq!(plain("a\u{1b}[31m\r\nb"), "a [31m b");
    }
}
