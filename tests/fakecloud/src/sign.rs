//! Signatures of requests, as the server computes them (cloudstack-api.md 1.2 to 1.4).

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use sha1::Sha1;
use sha2::Sha512;

/// The hashes that a server takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signatures {
    /// HMAC-SHA1, as every server read.
    Sha1,
    /// HMAC-SHA512 and nothing else: a newer server with SHA1 switched off.
    Sha512,
    /// Either of the two: nothing in a request names its algorithm.
    Either,
}

/// Java's URLEncoder over UTF-8 with `%20` for a space: `A-Z a-z 0-9 . - * _` go unescaped.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'*' | b'_' => out.push(char::from(byte)),
            other => out.push_str(&format!("%{other:02X}")),
        }
    }
    out
}

/// The string that is signed: sorted by name as sent, values escaped, all of it lower-cased last.
pub fn string_to_sign(params: &[(String, String)]) -> String {
    let mut sorted: Vec<_> = params.iter().filter(|(name, _)| !name.eq_ignore_ascii_case("signature")).collect();
    // Java compares UTF-16 units; over names of ASCII that is the order of bytes.
    sorted.sort_by(|a, b| a.0.cmp(&b.0));
    let joined: Vec<_> = sorted.iter().map(|(name, value)| format!("{name}={}", escape(value))).collect();
    joined.join("&").to_lowercase()
}

/// HMAC-SHA1 of [`string_to_sign`], Base64.
pub fn sha1(params: &[(String, String)], secret: &str) -> String {
    hmac::<Hmac<Sha1>>(params, secret)
}

/// HMAC-SHA512 of [`string_to_sign`], Base64.
pub fn sha512(params: &[(String, String)], secret: &str) -> String {
    hmac::<Hmac<Sha512>>(params, secret)
}

fn hmac<M: Mac + KeyInit>(params: &[(String, String)], secret: &str) -> String {
    // A key of any length is taken: the error of this constructor is for MACs of fixed keys.
    let Ok(mut mac) = <M as KeyInit>::new_from_slice(secret.as_bytes()) else { return String::new() };
    mac.update(string_to_sign(params).as_bytes());
    STANDARD.encode(mac.finalize().into_bytes())
}

/// Whether `signature` is one that a server of this kind takes.
pub fn verify(kind: Signatures, params: &[(String, String)], secret: &str, signature: &str) -> bool {
    let one = || sha1(params, secret) == signature;
    let other = || sha512(params, secret) == signature;
    match kind {
        Signatures::Sha1 => one(),
        Signatures::Sha512 => other(),
        Signatures::Either => one() || other(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "EXAMPLE-api_KEY-0123456789abcdefABCDEF";
    const SECRET: &str = "EXAMPLE-secret_KEY-fedcba9876543210FEDCBA";
    const VM: &str = "8f1f4c3e-2f0b-4a57-9d0e-1c2b3a4d5e6f";
    const VOLUME: &str = "3c9a6f0e-5b7d-4e1a-8f22-0a1b2c3d4e5f";

    fn params(further: &[(&str, &str)]) -> Vec<(String, String)> {
        let all = [("apiKey", KEY), ("response", "json")].into_iter().chain(further.iter().copied());
        all.map(|(n, v)| (n.to_owned(), v.to_owned())).collect()
    }

    #[test]
    fn the_vectors_of_the_page_come_out() {
        let v1: &[_] = &[("command", "listVolumes"), ("virtualmachineid", VM)];
        let v2: &[_] = &[
            ("command", "attachVolume"),
            ("id", VOLUME),
            ("virtualmachineid", VM),
            ("customjobid", "11111111-2222-4333-8444-555566667777"),
            ("signatureVersion", "3"),
            ("expires", "2031-02-03T04:05:06+0000"),
        ];
        let v3: &[_] = &[
            ("command", "updateVolume"),
            ("id", VOLUME),
            ("name", "Disk A+B/100% *\u{c9}_x.y-z"),
            ("signatureVersion", "3"),
            ("expires", "2031-02-03T04:05:06+0000"),
        ];
        let v4: &[_] = &[("command", "listVolumes"), ("name", "backup~1")];
        let v5: &[_] = &[("command", "listVolumes"), ("tags[0].key", "owner"), ("tags[0].value", "Team X")];
        for (further, signature) in [
            (v1, "U5BLMcd7DkUK3VgpP2k8bHdDGI4="),
            (v2, "6YWAUBE6TLM4Ja67Fr91SWU88M0="),
            (v3, "2IrbFSYD/1LyVhBGs1avR8eYiKU="),
            (v4, "FUfSSUrK8cTpRZQ5+A0biU73/9o="),
            (v5, "h+61xT8ca/ZeFl/LiQAOVAzPphY="),
        ] {
            let params = params(further);
            assert_eq!(sha1(&params, SECRET), signature, "{}", string_to_sign(&params));
        }
    }

    #[test]
    fn the_sha512_vector_of_the_page_comes_out_and_is_taken_only_where_it_should_be() {
        let params = params(&[("command", "listVolumes"), ("virtualmachineid", VM)]);
        let signature = "Vqv49RSaIe+ThiSNbLMteVEQoFsaBF/dAlu4bbVYk9p8H2N9FRTr9zkOTgdaSa8AvHRSQSjNzmDp4zzlZ8GxxQ==";
        assert_eq!(sha512(&params, SECRET), signature);
        assert!(!verify(Signatures::Sha1, &params, SECRET, signature));
        assert!(verify(Signatures::Sha512, &params, SECRET, signature));
        assert!(verify(Signatures::Either, &params, SECRET, signature));
        assert!(!verify(Signatures::Sha512, &params, SECRET, &sha1(&params, SECRET)));
    }

    #[test]
    fn an_accented_letter_keeps_its_case_in_the_string() {
        let text = string_to_sign(&params(&[("name", "\u{c9}")]));
        assert!(text.contains("name=%c3%89"), "{text}");
    }

    #[test]
    fn the_signature_itself_is_not_signed_however_its_name_is_written() {
        let plain = params(&[("command", "listZones")]);
        let with = params(&[("command", "listZones"), ("Signature", "x")]);
        assert_eq!(sha1(&plain, SECRET), sha1(&with, SECRET));
    }
}
