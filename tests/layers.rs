//! Who may import what (design/architecture.md), held against the sources.
//!
//! The sources are read as text: every `crate::…` and `super::…` path and every external crate's
//! name outside `#[cfg(test)]` items, comments and string literals. So a path written out in the
//! middle of a function counts as much as a `use` line.

// A helper of tests that cannot go on is a failed test.
#![allow(clippy::expect_used, clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Layer, and the layers of this crate that it may name beside itself.
const LAYERS: &[(&str, &[&str])] = &[
    ("model", &[]),
    ("command", &["model", "error"]),
    ("error", &["model"]),
    ("failpoint", &[]),
    ("sys", &[]),
    ("kept", &[]),
    ("store", &["model", "error", "sys", "failpoint"]),
    ("cloud", &["model", "error", "sys", "failpoint"]),
    ("devices", &["model", "error", "sys", "failpoint"]),
    ("engine", &["model", "error", "command", "failpoint", "store", "cloud", "devices"]),
    ("fs", &["engine", "command", "model", "error", "failpoint", "kept"]),
    ("config", &["model", "command", "error"]),
    ("binding", &["config", "model", "store"]),
    (
        "daemon",
        &[
            "binding",
            "cloud",
            "command",
            "config",
            "devices",
            "engine",
            "error",
            "failpoint",
            "fs",
            "handover",
            "keeper",
            "kept",
            "model",
            "store",
            "sys",
        ],
    ),
    ("keeper", &["config", "fs", "kept"]),
    ("handover", &["config", "fs", "keeper", "kept"]),
    ("start", &["config", "daemon", "handover", "keeper"]),
    ("upgrade", &["config", "daemon", "fs", "kept", "start"]),
    ("check", &["cloud", "config", "daemon", "devices", "engine", "model", "start", "store"]),
    ("import", &["model", "store"]),
    ("upkeep", &["binding", "cloud", "config", "daemon", "failpoint", "import", "model", "store"]),
    ("demo", &["config", "start", "sys"]),
    ("lib", &[]),
    ("main", &["config", "start", "check", "demo", "daemon", "upgrade", "upkeep"]),
];

/// Of store, cloud and devices the engine may name the traits and their types, not what is in their
/// modules, nor these implementations where they are exported from there.
const IMPLEMENTATIONS: &[&str] = &["SqliteStore", "LoopCloud", "LoopOptions", "KernelDevices", "LinuxDevices"];

fn is_implementation(path: &str) -> bool {
    let mut words = path.split("::");
    let layer = words.next().unwrap_or_default();
    let inside = words.next().unwrap_or_default();
    ["store", "cloud", "devices"].contains(&layer)
        && (IMPLEMENTATIONS.contains(&inside) || inside.starts_with(|c: char| c.is_ascii_lowercase()))
}

/// External crates that only these layers may name.
const CRATES: &[(&str, &[&str])] = &[
    ("fuser", &["fs"]),
    ("rusqlite", &["store"]),
    ("rusqlite_migration", &["store"]),
    ("reqwest", &["cloud"]),
    ("rustls", &["cloud"]),
    ("ring", &["cloud"]),
    ("zeroize", &["cloud"]),
    ("clap", &["config"]),
    ("toml", &["config"]),
    ("flate2", &["import"]),
];

/// Layers without I/O, locks and clocks: texts that none of their code holds.
const PURE: &[&str] = &["model", "command", "error"];
const IMPURE: &[&str] = &[
    "std::fs",
    "std::net",
    "std::process::Command",
    "std::thread",
    "std::env",
    "std::io",
    "std::sync::Mutex",
    "std::sync::RwLock",
    "parking_lot",
    "tokio",
    "rustix",
    "tracing",
    "SystemTime::now",
    "Instant",
    "println!",
    "eprintln!",
];

/// `src/store/sqlite/mod.rs` is of the layer `store`.
fn layer(file: &Path) -> String {
    let first = file.iter().next().map(|c| c.to_string_lossy().into_owned()).unwrap_or_default();
    first.trim_end_matches(".rs").to_owned()
}

/// The code without comments, string and character literals, and `#[cfg(test)]` items: their places
/// are blank. Newlines stay, so that line numbers do.
fn code(source: &str) -> String {
    let plain = without_literals(source);
    let mut out = String::with_capacity(plain.len());
    let mut rest = plain.as_str();
    while let Some(at) = rest.find("#[cfg(test)]") {
        let (before, item) = rest.split_at(at);
        out.push_str(before);
        // The item ends at its `;`, or at the brace that closes the first one opened.
        let mut depth = 0usize;
        let mut end = item.len();
        for (i, c) in item.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            if depth == 0 && (c == '}' || c == ';') {
                end = i + 1;
                break;
            }
        }
        out.extend(item[..end].chars().filter(|c| *c == '\n'));
        rest = &item[end..];
    }
    out.push_str(rest);
    out
}

fn without_literals(source: &str) -> String {
    let b = source.as_bytes();
    let mut out = Vec::with_capacity(b.len());
    let blank = |out: &mut Vec<u8>, part: &[u8]| out.extend(part.iter().filter(|c| **c == b'\n'));
    let mut i = 0;
    while i < b.len() {
        let rest = &b[i..];
        let taken = if rest.starts_with(b"//") {
            rest.iter().position(|c| *c == b'\n').unwrap_or(rest.len())
        } else if rest.starts_with(b"/*") {
            block_comment(rest)
        } else if let Some(n) = raw_string(rest).filter(|_| i == 0 || !is_word(b[i - 1]) || b[i - 1] == b'b') {
            n
        } else if rest[0] == b'"' {
            quoted(rest)
        } else if let Some(n) = character(rest) {
            n
        } else {
            out.push(rest[0]);
            i += 1;
            continue;
        };
        blank(&mut out, &rest[..taken]);
        // Two words around a literal stay two.
        out.push(b' ');
        i += taken;
    }
    String::from_utf8(out).expect("only whole characters are cut out")
}

fn is_word(c: u8) -> bool {
    c.is_ascii_alphanumeric() || c == b'_'
}

fn block_comment(text: &[u8]) -> usize {
    let (mut depth, mut i) = (0, 0);
    while i < text.len() {
        match &text[i..] {
            [b'/', b'*', ..] => {
                depth += 1;
                i += 2;
            }
            [b'*', b'/', ..] => {
                depth -= 1;
                i += 2;
                if depth == 0 {
                    return i;
                }
            }
            _ => i += 1,
        }
    }
    i
}

fn raw_string(text: &[u8]) -> Option<usize> {
    let rest = text.strip_prefix(b"r")?;
    let hashes = rest.iter().take_while(|c| **c == b'#').count();
    if rest.get(hashes) != Some(&b'"') {
        return None;
    }
    let mut end = vec![b'"'];
    end.resize(hashes + 1, b'#');
    let body = &rest[hashes + 1..];
    let at = body.windows(end.len()).position(|w| w == end)?;
    Some(1 + hashes + 1 + at + end.len())
}

fn quoted(text: &[u8]) -> usize {
    let mut i = 1;
    while i < text.len() {
        match text[i] {
            b'\\' => i += 2,
            b'"' => return i + 1,
            _ => i += 1,
        }
    }
    text.len()
}

/// `'x'` and `'\n'`, but not the lifetime `'x`.
fn character(text: &[u8]) -> Option<usize> {
    let rest = text.strip_prefix(b"'")?;
    if rest.first() == Some(&b'\\') {
        return Some(3 + rest.iter().skip(2).position(|c| *c == b'\'')? + 1);
    }
    let first = std::str::from_utf8(&rest[..rest.len().min(4)]).map_or_else(
        |e| std::str::from_utf8(&rest[..e.valid_up_to()]).ok().and_then(|t| t.chars().next()),
        |t| t.chars().next(),
    )?;
    (rest.get(first.len_utf8()) == Some(&b'\'')).then_some(first.len_utf8() + 2)
}

/// Every path that starts with `start::`, braces opened: `crate::{a, b::{c, d}}` is `a`, `b::c`, `b::d`.
fn paths(code: &str, start: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices(start) {
        let before = code[..at].bytes().next_back();
        let after = code[at + start.len()..].trim_start();
        if before.is_some_and(|c| is_word(c) || c == b':') || !after.starts_with("::") {
            continue;
        }
        let line = code[..at].matches('\n').count() + 1;
        let mut ends = Vec::new();
        tree(after[2..].trim_start(), "", &mut ends);
        found.extend(ends.into_iter().map(|p| (line, p)));
    }
    found
}

/// Reads one use tree, and returns what follows it.
fn tree<'a>(text: &'a str, prefix: &str, found: &mut Vec<String>) -> &'a str {
    let join = |word: &str| if prefix.is_empty() { word.to_owned() } else { format!("{prefix}::{word}") };
    if let Some(mut rest) = text.strip_prefix('{') {
        loop {
            rest = rest.trim_start_matches([' ', '\n', '\t', ',']);
            if rest.is_empty() {
                return rest;
            }
            if let Some(after) = rest.strip_prefix('}') {
                return after;
            }
            let before = rest.len();
            rest = tree(rest, prefix, found);
            // `self as x`, `*`: whatever is no word is passed over.
            if rest.len() == before {
                let next = rest.chars().next().map_or(1, char::len_utf8);
                rest = &rest[next..];
            }
        }
    }
    let end = text.bytes().position(|c| !is_word(c)).unwrap_or(text.len());
    let (word, rest) = text.split_at(end);
    if word.is_empty() || word == "as" || word == "self" {
        if !prefix.is_empty() {
            found.push(prefix.to_owned());
        }
        return rest;
    }
    match rest.trim_start().strip_prefix("::") {
        Some(deeper) => tree(deeper.trim_start(), &join(word), found),
        None => {
            found.push(join(word));
            rest
        }
    }
}

/// What is wrong in one file, a sentence each.
fn violations(file: &Path, source: &str) -> Vec<String> {
    let own = layer(file);
    let code = code(source);
    let mut wrong = Vec::new();
    let shown = file.display();
    let Some((_, allowed)) = LAYERS.iter().find(|(name, _)| *name == own) else {
        return vec![format!("{shown}: the layer {own} is not in the list of tests/layers.rs")];
    };
    let names: BTreeSet<&str> = LAYERS.iter().map(|(name, _)| *name).collect();
    // `super::` reaches another layer from a layer's root file alone, and only by that many steps.
    let mut all = paths(&code, "crate");
    all.extend(paths(&code, "volfs"));
    let depth = file.components().count() - usize::from(file.file_stem().is_some_and(|s| s == "mod"));
    for (line, path) in paths(&code, "super") {
        let mut words = path.split("::").peekable();
        let mut up = 1;
        while words.peek() == Some(&"super") {
            words.next();
            up += 1;
        }
        if up >= depth {
            all.push((line, words.collect::<Vec<_>>().join("::")));
        }
    }
    for (line, path) in all {
        let head = path.split("::").next().unwrap_or_default();
        if head == own || !names.contains(head) {
            continue;
        }
        if !allowed.contains(&head) {
            wrong.push(format!("{shown}:{line}: {own} names {path}"));
        } else if own == "engine" && is_implementation(&path) {
            wrong.push(format!("{shown}:{line}: engine names the implementation {path}"));
        }
    }
    for (name, owners) in CRATES.iter().filter(|(_, owners)| !owners.contains(&own.as_str())) {
        for (line, path) in paths(&code, name) {
            wrong.push(format!("{shown}:{line}: {own} names {name}::{path}, which belongs to {}", owners.join(", ")));
        }
    }
    if PURE.contains(&own.as_str()) {
        // `use std::{fs, io}` as well as `std::fs::read`.
        let full = paths(&code, "std").into_iter().map(|(line, p)| (line, format!("std::{p}")));
        for (line, path) in full {
            if IMPURE.iter().any(|i| path == *i || path.starts_with(&format!("{i}::"))) {
                wrong.push(format!("{shown}:{line}: {own} is pure, but names {path}"));
            }
        }
        for (number, line) in code.lines().enumerate() {
            for text in IMPURE.iter().filter(|i| !i.starts_with("std::") && has_word(line, i)) {
                wrong.push(format!("{shown}:{}: {own} is pure, but names {text}", number + 1));
            }
        }
    }
    wrong
}

fn has_word(line: &str, text: &str) -> bool {
    line.match_indices(text).any(|(at, _)| {
        let before = line[..at].bytes().next_back().is_some_and(is_word);
        let after = line[at + text.len()..].bytes().next().is_some_and(is_word);
        !before && !after
    })
}

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// Files and directories that are tests as a whole.
fn is_test(file: &Path) -> bool {
    file.iter().any(|c| c == "tests" || c.to_string_lossy().ends_with("tests.rs") || c == "testing.rs")
}

#[test]
fn every_layer_names_only_what_it_may() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    assert!(files.len() > 10, "the sources were not found in {}", src.display());
    let mut wrong = Vec::new();
    for file in files {
        let name = file.strip_prefix(&src).unwrap();
        if !is_test(name) {
            wrong.extend(violations(name, &std::fs::read_to_string(&file).unwrap()));
        }
    }
    assert!(wrong.is_empty(), "imports against the layers:\n{}", wrong.join("\n"));
}

#[test]
fn a_violation_is_reported_however_it_is_written() {
    let cases: &[(&str, &str)] = &[
        ("store/sqlite/mod.rs", "use crate::cloud::Cloud;"),
        ("store/mod.rs", "use crate::{model::JobId, engine::{self, World}};"),
        ("store/mod.rs", "fn f() { crate::fs::start() }"),
        ("store/mod.rs", "use super::engine::Engine;"),
        ("store/sqlite/mod.rs", "use super::super::engine::Engine;"),
        ("store/sqlite.rs", "use super::super::engine::Engine;"),
        ("config.rs", "use super::daemon;"),
        ("engine/mod.rs", "use crate::cloud::loopdev::LoopCloud;"),
        ("engine/mod.rs", "use crate::sys;"),
        ("engine/run.rs", "use crate::store::{Store, SqliteStore};"),
        ("engine/mod.rs", "use fuser::Errno;"),
        ("devices/mod.rs", "use rusqlite::Connection;"),
        ("engine/mod.rs", "use reqwest::Client;"),
        ("engine/mod.rs", "use crate::cloud::cloudstack::Client;"),
        ("config/cloudstack.rs", "use crate::cloud::cloudstack::Signature;"),
        ("fs/mod.rs", "use crate::\n    store::Store;"),
        ("model.rs", "use std::{fmt, fs};"),
        ("model.rs", "fn f() { let t = std::time::SystemTime::now(); }"),
        ("command.rs", "static M: parking_lot::Mutex<u8> = parking_lot::const_mutex(0);"),
        ("error.rs", "fn f() { println!(); }"),
        ("model.rs", "#[cfg(test)]\nmod tests { fn f() { let s = \"}\"; } }\nuse crate::store::Store;"),
        ("main.rs", "use volfs::engine::Engine;"),
        ("new.rs", "fn f() {}"),
    ];
    for (file, source) in cases {
        assert!(!violations(Path::new(file), source).is_empty(), "{file}: {source}");
    }
}

#[test]
fn what_is_allowed_is_not_reported() {
    let cases: &[(&str, &str)] = &[
        ("engine/mod.rs", "use crate::{store::{Change, Store}, cloud::Cloud, devices::{self, Devices}};"),
        ("engine/admission.rs", "use super::Target; use super::ticket;"),
        ("store/sqlite/writer.rs", "use super::super::Change; use rusqlite::Connection;"),
        (
            "store/mod.rs",
            "// use crate::engine;\n/* crate::fs::x /* crate::fs::y */ */ const S: &str = \"crate::fs::x\";",
        ),
        ("store/mod.rs", "const S: &str = r#\"a \" crate::fs::x\"#; const C: char = '\"'; const D: char = '\\'';"),
        ("store/mod.rs", "#[cfg(test)]\nuse crate::engine::Engine;\n#[cfg(test)]\nmod tests { use crate::fs::x; }"),
        ("model.rs", "use std::time::{Duration, SystemTime, UNIX_EPOCH}; fn f<'a>(x: &'a str) -> &'a str { x }"),
        ("fs/mod.rs", "use fuser::Filesystem; use crate::engine::Engine;"),
    ];
    for (file, source) in cases {
        let wrong = violations(Path::new(file), source);
        assert!(wrong.is_empty(), "{source}: {wrong:?}");
    }
}
