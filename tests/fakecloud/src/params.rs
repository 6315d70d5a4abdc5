//! Parameters of a request: decoding, and reading as the commands need them.

use std::collections::{BTreeMap, BTreeSet};

use crate::answer::Refusal;

/// Decodes `a=b&c=d`, `+` and `%XX`. Bytes that are no UTF-8 become U+FFFD.
pub(crate) fn decode_form(text: &str) -> Vec<(String, String)> {
    let pairs = text.split('&').filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode(name), decode(value))
        })
        .collect()
}

fn decode(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        match first {
            b'+' => out.push(b' '),
            b'%' => {
                let hex = after.get(..2).and_then(|two| std::str::from_utf8(two).ok());
                match hex.and_then(|two| u8::from_str_radix(two, 16).ok()) {
                    Some(byte) => {
                        out.push(byte);
                        rest = &after[2..];
                    }
                    None => out.push(b'%'),
                }
            }
            other => out.push(*other),
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// A request's parameters; names other than the value of `command` regardless of case.
#[derive(Debug, Clone)]
pub(crate) struct Params {
    /// As sent, for the signature.
    pub raw: Vec<(String, String)>,
    lower: BTreeMap<String, String>,
}

impl Params {
    pub fn new(raw: Vec<(String, String)>) -> Self {
        let mut lower = BTreeMap::new();
        for (name, value) in &raw {
            // Of one sent twice the first counts; the signature will not fit then.
            lower.entry(name.to_lowercase()).or_insert_with(|| value.clone());
        }
        Params { raw, lower }
    }

    /// Whether one was sent twice, in the query and in the body for example.
    pub fn twice(&self) -> bool {
        let mut seen = BTreeSet::new();
        !self.raw.iter().all(|(name, _)| seen.insert(name))
    }

    /// A parameter that is there and not empty.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.lower.get(name).map(String::as_str).filter(|v| !v.is_empty())
    }

    /// One that must be there.
    pub fn need(&self, command: &str, name: &str) -> Result<&str, Refusal> {
        self.get(name).ok_or_else(|| {
            let command = command.to_lowercase();
            Refusal::parameter(format!("Unable to execute API command {command} due to missing parameter {name}"))
        })
    }

    /// A number, if it is there.
    pub fn number<T: std::str::FromStr>(&self, command: &str, name: &str) -> Result<Option<T>, Refusal> {
        let Some(text) = self.get(name) else { return Ok(None) };
        text.trim().parse().map(Some).map_err(|_| invalid(command, name, text))
    }

    /// A boolean: absent is false.
    pub fn flag(&self, name: &str) -> bool {
        self.get(name).is_some_and(|v| v.eq_ignore_ascii_case("true"))
    }

    /// A comma list, if it is there.
    pub fn list(&self, name: &str) -> Option<Vec<&str>> {
        self.get(name).map(|text| text.split(',').map(str::trim).filter(|part| !part.is_empty()).collect())
    }

    /// `tags[0].key=a`, `tags[0].value=b`, …: in the order of their numbers.
    ///
    /// # Errors
    /// 430 for a name of another shape.
    pub fn tags(&self) -> Result<Vec<(String, Option<String>)>, Refusal> {
        let mut found: BTreeMap<u32, (Option<String>, Option<String>)> = BTreeMap::new();
        for (name, value) in self.lower.range("tags".to_owned()..) {
            let Some(rest) = name.strip_prefix("tags") else { break };
            let malformed = || Refusal::new(430, 9999, format!("Malformed parameter {name}"));
            let (index, field) = rest.strip_prefix('[').and_then(|r| r.split_once("].")).ok_or_else(malformed)?;
            let entry = found.entry(index.parse().map_err(|_| malformed())?).or_default();
            match field {
                "key" => entry.0 = Some(value.clone()),
                "value" => entry.1 = Some(value.clone()),
                _ => {}
            }
        }
        let no_key = || Refusal::parameter("Unable to execute API command due to invalid value: a tag without a key");
        found.into_values().map(|(key, value)| Ok((key.ok_or_else(no_key)?, value))).collect()
    }

    /// page and pagesize (1.9): `None` for the first rows.
    pub fn page(&self, command: &str, most: usize) -> Result<Option<(usize, usize)>, Refusal> {
        let (page, size) = (self.number::<i64>(command, "page")?, self.number::<i64>(command, "pagesize")?);
        let (page, size) = match (page, size) {
            (None, None) => return Ok(None),
            (Some(page), Some(size)) => (page, size),
            _ => return Err(Refusal::parameter("\"page\" and \"pagesize\" must be specified together")),
        };
        if size > i64::try_from(most).unwrap_or(i64::MAX) {
            return Err(Refusal::parameter(format!("Page size can't exceed max allowed page size value: {most}")));
        }
        match (usize::try_from(page), usize::try_from(size)) {
            (Ok(page), Ok(size)) if page > 0 && size > 0 => Ok(Some((page, size))),
            _ => Err(Refusal::parameter("Page and page size must be positive")),
        }
    }
}

/// The text for a value that cannot be, unknown UUIDs included (section 2).
pub(crate) fn invalid(command: &str, name: &str, value: &str) -> Refusal {
    let command = command.to_lowercase();
    Refusal::parameter(format!(
        "Unable to execute API command {command} due to invalid value. Invalid parameter {name} value={value} due to \
         incorrect long value format, or entity does not exist or due to incorrect parameter annotation for the \
         field in api cmd class."
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(text: &str) -> Params {
        Params::new(decode_form(text))
    }

    #[test]
    fn a_form_is_decoded_however_it_was_escaped() {
        let all = decode_form("a=x+y%2Bz&tags%5B0%5D.key=%C3%89&empty=&bad=%zz&last");
        let expected = [("a", "x y+z"), ("tags[0].key", "\u{c9}"), ("empty", ""), ("bad", "%zz"), ("last", "")];
        assert_eq!(all, expected.map(|(n, v)| (n.to_owned(), v.to_owned())));
    }

    #[test]
    fn tags_come_in_order_and_malformed_ones_are_430() {
        let tags = params("tags[1].key=b&tags[0].key=a&tags[0].value=1").tags().unwrap();
        assert_eq!(tags, [("a".to_owned(), Some("1".to_owned())), ("b".to_owned(), None)]);
        assert_eq!(params("tags[x].key=b").tags().unwrap_err().code, 430);
        assert_eq!(params("tags.key=b").tags().unwrap_err().code, 430);
    }

    #[test]
    fn page_and_pagesize_come_together_and_below_the_limit() {
        assert_eq!(params("").page("listVolumes", 500).unwrap(), None);
        assert_eq!(params("page=2&pageSize=500").page("listVolumes", 500).unwrap(), Some((2, 500)));
        for bad in ["page=1", "pagesize=5", "page=1&pagesize=501", "page=0&pagesize=5", "page=1&pagesize=-1"] {
            assert_eq!(params(bad).page("listVolumes", 500).unwrap_err().code, 431, "{bad}");
        }
    }
}
