//! Envelopes and errors (1.5).

use serde_json::{Map, Value, json};

/// A refusal in the request itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// HTTP status and errorcode.
    pub code: u32,
    /// cserrorcode: the class of the exception.
    pub cs: u32,
    pub text: String,
    /// The envelope's key is `errorresponse`, not the command's.
    pub anonymous: bool,
}

impl Refusal {
    pub fn new(code: u32, cs: u32, text: impl Into<String>) -> Self {
        Refusal { code, cs, text: text.into(), anonymous: false }
    }

    /// InvalidParameterValueException: most of them.
    pub fn parameter(text: impl Into<String>) -> Self {
        Refusal::new(431, 4350, text)
    }

    /// PermissionDeniedException on an object.
    pub fn denied(text: impl Into<String>) -> Self {
        Refusal::new(531, 4365, text)
    }

    /// CloudRuntimeException.
    pub fn internal(text: impl Into<String>) -> Self {
        Refusal::new(530, 4250, text)
    }

    /// A bare API error with the key `errorresponse`.
    pub fn anonymous(code: u32, text: impl Into<String>) -> Self {
        Refusal { anonymous: true, ..Refusal::new(code, 9999, text) }
    }

    /// 401 without saying why.
    pub fn signature() -> Self {
        Refusal::new(401, 9999, "unable to verify user credentials and/or request signature")
    }

    /// The body of the answer to `command`.
    pub fn body(&self, command: &str) -> Value {
        let inner = json!({
            "uuidList": [],
            "errorcode": self.code,
            "cserrorcode": self.cs,
            "errortext": self.text,
        });
        let key = if self.anonymous || command.is_empty() { "errorresponse".into() } else { key(command) };
        keyed(&key, inner)
    }
}

/// A refusal in the job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub code: u32,
    pub text: String,
}

impl Failure {
    /// InvalidParameterValueException.
    pub fn parameter(text: impl Into<String>) -> Self {
        Failure { code: 431, text: text.into() }
    }

    /// Everything else, permission included.
    pub fn internal(text: impl Into<String>) -> Self {
        Failure { code: 530, text: text.into() }
    }

    /// `jobresult` of the failed job: no cserrorcode.
    pub fn result(&self) -> Value {
        json!({"errorcode": self.code, "errortext": self.text})
    }
}

/// `listvolumesresponse` for `listVolumes`.
pub(crate) fn key(command: &str) -> String {
    format!("{}response", command.to_lowercase())
}

/// An object with one key.
pub(crate) fn keyed(key: &str, value: Value) -> Value {
    Value::Object(Map::from_iter([(key.to_owned(), value)]))
}

/// A page of a list: `{}` when nothing matches, count without array past the end (1.5).
pub(crate) fn list(name: &str, all: Vec<Value>, page: Option<(usize, usize)>, most: usize) -> Value {
    let count = all.len();
    if count == 0 {
        return json!({});
    }
    let (skip, take) = page.map_or((0, most), |(page, size)| ((page - 1).saturating_mul(size), size));
    let shown: Vec<_> = all.into_iter().skip(skip).take(take).collect();
    if shown.is_empty() { json!({"count": count}) } else { json!({"count": count, name: shown}) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_match_is_an_empty_object_and_a_page_past_the_end_a_bare_count() {
        assert_eq!(list("volume", vec![], None, 500), json!({}));
        let all = vec![json!(1), json!(2), json!(3)];
        assert_eq!(list("volume", all.clone(), Some((2, 2)), 500), json!({"count": 3, "volume": [3]}));
        assert_eq!(list("volume", all, Some((3, 2)), 500), json!({"count": 3}));
    }
}
