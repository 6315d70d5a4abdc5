//! Commands in the guest, over a serial port: `init` has the other end.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;

use crate::heard::Heard;

/// What a script printed on either of its outputs, and its status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    pub status: i32,
    pub out: String,
}

#[derive(Default)]
struct Port {
    ready: bool,
    said: HashMap<u64, Said>,
}

/// The test's end of the port.
pub struct Agent {
    port: Mutex<(UnixStream, u64)>,
    heard: Arc<Heard<Port>>,
    reader: Option<JoinHandle<()>>,
}

/// A script on its way.
pub struct Running<'a> {
    agent: &'a Agent,
    id: u64,
}

/// A line of the guest's: `ready`, or `ID STATUS HEX`. Anything else is noise of the port.
fn parse(line: &str) -> Option<(u64, Said)> {
    let mut words = line.split(' ');
    let id = words.next()?.parse().ok()?;
    let status = words.next()?.parse().ok()?;
    let hex = words.next()?.as_bytes();
    let byte = |pair: &[u8]| std::str::from_utf8(pair).ok().and_then(|p| u8::from_str_radix(p, 16).ok());
    let bytes: Vec<u8> = hex.chunks(2).map(byte).collect::<Option<_>>()?;
    Some((id, Said { status, out: String::from_utf8_lossy(&bytes).into_owned() }))
}

impl Agent {
    pub fn new(port: UnixStream) -> Self {
        let heard = Arc::new(Heard::<Port>::default());
        let from = port.try_clone().expect("another descriptor of the port");
        let hearing = heard.clone();
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(from).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
                match parse(&line) {
                    _ if line == "ready" => hearing.hear(|h| h.ready = true),
                    Some((id, said)) => hearing.hear(|h| drop(h.said.insert(id, said))),
                    None => {}
                }
            }
            hearing.end();
        });
        Agent { port: Mutex::new((port, 0)), heard, reader: Some(reader) }
    }

    /// Whether the guest has booted to its agent.
    pub fn ready(&self, within: Duration) -> bool {
        self.heard.wait(within, |h| h.ready.then_some(())).is_some()
    }

    /// The guest is about to boot (again): what it has said so far does not count.
    pub fn forget(&self) {
        self.heard.hear(|h| *h = Port::default());
    }

    /// Starts a script; others may run beside it.
    pub fn start(&self, script: &str) -> Running<'_> {
        let mut port = self.port.lock();
        port.1 += 1;
        let id = port.1;
        let mut line = format!("{id} ");
        for byte in script.bytes() {
            let _ = write!(line, "{byte:02x}");
        }
        line.push('\n');
        port.0.write_all(line.as_bytes()).unwrap_or_else(|e| panic!("the guest's port: {e}"));
        Running { agent: self, id }
    }
}

impl Running<'_> {
    /// What it said; `None` if it had not ended in time, or the machine had.
    pub fn said(&self, within: Duration) -> Option<Said> {
        self.agent.heard.wait(within, |h| h.said.remove(&self.id))
    }
}

impl Drop for Agent {
    /// The machine is dead by now, so the reader is at its end.
    fn drop(&mut self) {
        let _ = self.port.lock().0.shutdown(std::net::Shutdown::Both);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

#[test]
fn a_line_that_is_no_answer_is_none() {
    assert_eq!(parse("3 0 6f6b0a"), Some((3, Said { status: 0, out: "ok\n".into() })));
    assert_eq!(parse("3 127 "), Some((3, Said { status: 127, out: String::new() })));
    for noise in ["", "ready", "[  2.1] virtio", "3", "3 0", "3 0 zz", "x 0 6f"] {
        assert_eq!(parse(noise), None, "{noise:?}");
    }
}
