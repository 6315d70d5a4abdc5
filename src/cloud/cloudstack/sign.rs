//! The string that CloudStack signs, the signature, and the body that carries both (page 1.2).

use std::fmt;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::hmac;

use crate::model::Timestamp;

/// How long a request may be believed after it was made. The server refuses more than 15 minutes
/// (page 1.3), and a clock may be wrong by some of it in either direction.
pub const LIFETIME: Duration = Duration::from_secs(8 * 60);

/// Which hash signs, as configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Signature {
    /// Found by asking: SHA-1, then SHA-512.
    #[default]
    Auto,
    /// HMAC-SHA1: every version so far.
    Sha1,
    /// HMAC-SHA512: newer servers, some of which take nothing else.
    Sha512,
}

/// A hash that signs. A request does not name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// HMAC-SHA1.
    Sha1,
    /// HMAC-SHA512.
    Sha512,
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Algorithm::Sha1 => "HMAC-SHA1",
            Algorithm::Sha512 => "HMAC-SHA512",
        })
    }
}

/// `expires` for a request made at `now`: the one form that every version reads (page 1.3).
pub fn expires(now: Timestamp) -> String {
    format!("{}+0000", now.plus(LIFETIME).to_string().trim_end_matches('Z'))
}

/// Appends `text` as the server's own escaping writes it: only letters, digits and `.-*_` stand for
/// themselves, a blank is `%20`.
pub fn escape(out: &mut String, text: &str) {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'*' | b'_' => out.push(char::from(byte)),
            _ => {
                out.push('%');
                out.push(char::from(HEX[usize::from(byte >> 4)]));
                out.push(char::from(HEX[usize::from(byte & 15)]));
            }
        }
    }
}

/// What is signed. Names go in raw and are sorted as they are written, values escaped; then all of
/// it is lower case, the escapes' digits too.
pub fn text(params: &[(&str, &str)]) -> String {
    let mut sorted = params.to_vec();
    sorted.sort_unstable();
    let mut out = String::new();
    for (name, value) in sorted {
        if !out.is_empty() {
            out.push('&');
        }
        out.push_str(name);
        out.push('=');
        escape(&mut out, value);
    }
    out.make_ascii_lowercase();
    out
}

/// The signature over `params`, in Base64, before it is escaped for the body.
pub fn signature(params: &[(&str, &str)], secret: &str, algorithm: Algorithm) -> String {
    let hash = match algorithm {
        Algorithm::Sha1 => hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY,
        Algorithm::Sha512 => hmac::HMAC_SHA512,
    };
    let key = hmac::Key::new(hash, secret.as_bytes());
    STANDARD.encode(hmac::sign(&key, text(params).as_bytes()))
}

/// The form to post. `%20` for a blank is read like `+`, so one way of escaping serves both.
pub fn body(params: &[(&str, &str)], signature: &str) -> String {
    let mut out = String::new();
    for (name, value) in params.iter().chain(&[("signature", signature)]) {
        if !out.is_empty() {
            out.push('&');
        }
        escape(&mut out, name);
        out.push('=');
        escape(&mut out, value);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "EXAMPLE-secret_KEY-fedcba9876543210FEDCBA";
    const VM: &str = "8f1f4c3e-2f0b-4a57-9d0e-1c2b3a4d5e6f";
    const VOLUME: &str = "3c9a6f0e-5b7d-4e1a-8f22-0a1b2c3d4e5f";

    fn with_common<'a>(own: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
        let common = [("apiKey", "EXAMPLE-api_KEY-0123456789abcdefABCDEF"), ("response", "json")];
        own.iter().copied().chain(common).collect()
    }

    fn sha1(own: &[(&str, &str)]) -> String {
        signature(&with_common(own), SECRET, Algorithm::Sha1)
    }

    #[test]
    fn the_vectors_of_the_page_are_met() {
        let v1 = [("command", "listVolumes"), ("virtualmachineid", VM)];
        assert_eq!(sha1(&v1), "U5BLMcd7DkUK3VgpP2k8bHdDGI4=", "V1");
        let dated = [("signatureVersion", "3"), ("expires", "2031-02-03T04:05:06+0000")];
        let v2 = [
            ("command", "attachVolume"),
            ("id", VOLUME),
            ("virtualmachineid", VM),
            ("customjobid", "11111111-2222-4333-8444-555566667777"),
            dated[0],
            dated[1],
        ];
        assert_eq!(sha1(&v2), "6YWAUBE6TLM4Ja67Fr91SWU88M0=", "V2");
        let name = "Disk A+B/100% *\u{c9}_x.y-z";
        let v3 = [("command", "updateVolume"), ("id", VOLUME), ("name", name), dated[0], dated[1]];
        assert_eq!(sha1(&v3), "2IrbFSYD/1LyVhBGs1avR8eYiKU=", "V3");
        assert_eq!(sha1(&[("command", "listVolumes"), ("name", "backup~1")]), "FUfSSUrK8cTpRZQ5+A0biU73/9o=", "V4");
        let v5 = [("command", "listVolumes"), ("tags[0].key", "owner"), ("tags[0].value", "Team X")];
        assert_eq!(sha1(&v5), "h+61xT8ca/ZeFl/LiQAOVAzPphY=", "V5");
        let sha512 = signature(&with_common(&v1), SECRET, Algorithm::Sha512);
        let wanted = "Vqv49RSaIe+ThiSNbLMteVEQoFsaBF/dAlu4bbVYk9p8H2N9FRTr9zkOTgdaSa8AvHRSQSjNzmDp4zzlZ8GxxQ==";
        assert_eq!(sha512, wanted, "V1 with SHA-512");
    }

    #[test]
    fn the_text_that_is_signed_is_the_pages() {
        let name = "Disk A+B/100% *\u{c9}_x.y-z";
        let v3 = [
            ("command", "updateVolume"),
            ("id", VOLUME),
            ("name", name),
            ("signatureVersion", "3"),
            ("expires", "2031-02-03T04:05:06+0000"),
        ];
        assert_eq!(
            text(&with_common(&v3)),
            "apikey=example-api_key-0123456789abcdefabcdef&command=updatevolume&\
             expires=2031-02-03t04%3a05%3a06%2b0000&id=3c9a6f0e-5b7d-4e1a-8f22-0a1b2c3d4e5f&\
             name=disk%20a%2bb%2f100%25%20*%c3%89_x.y-z&response=json&signatureversion=3"
        );
    }

    #[test]
    fn the_order_of_parameters_does_not_matter() {
        let mut v = with_common(&[("command", "listVolumes"), ("virtualmachineid", VM)]);
        v.reverse();
        assert_eq!(signature(&v, SECRET, Algorithm::Sha1), "U5BLMcd7DkUK3VgpP2k8bHdDGI4=");
    }

    #[test]
    fn a_body_escapes_names_values_and_the_signature() {
        let got = body(&[("tags[0].key", "a b~\u{c9}"), ("n", "")], "+/=");
        assert_eq!(got, "tags%5B0%5D.key=a%20b%7E%C3%89&n=&signature=%2B%2F%3D");
    }

    #[test]
    fn a_request_lives_eight_minutes_in_the_form_that_all_versions_read() {
        assert_eq!(expires(Timestamp(1_795_411_927_000)), "2026-11-23T05:40:07+0000");
    }
}
