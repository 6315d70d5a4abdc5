//! QEMU's control protocol: commands with their answers, and the events between them.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::heard::Heard;

/// Longest wait for an answer: QEMU answers from its main loop, which emulation does not hold up for long.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

#[derive(Default)]
struct Messages {
    answers: HashMap<u64, Result<Value, String>>,
    /// All events since the start, in order: few, and a waiter may come after its event.
    events: Vec<Value>,
}

/// A connection.
pub struct Qmp {
    to: Mutex<(UnixStream, u64)>,
    heard: Arc<Heard<Messages>>,
    reader: Option<JoinHandle<()>>,
}

impl Qmp {
    /// A new connection: the first command must be `qmp_capabilities`.
    pub fn new(stream: UnixStream) -> Self {
        let heard = Arc::new(Heard::<Messages>::default());
        let hearing = heard.clone();
        let from = stream.try_clone().expect("another descriptor of the socket");
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(from).lines().map_while(Result::ok) {
                let Ok(message) = serde_json::from_str::<Value>(&line) else { continue };
                let id = message["id"].as_u64();
                let answer = match (message.get("return"), message.get("error")) {
                    (Some(value), _) => Some(Ok(value.clone())),
                    (_, Some(error)) => Some(Err(error["desc"].as_str().unwrap_or("no reason given").to_owned())),
                    _ => None,
                };
                hearing.hear(|h| match (id, answer) {
                    (Some(id), Some(answer)) => drop(h.answers.insert(id, answer)),
                    _ if message.get("event").is_some() => h.events.push(message),
                    _ => {}
                });
            }
            hearing.end();
        });
        Qmp { to: Mutex::new((stream, 0)), heard, reader: Some(reader) }
    }

    /// Does one command; the error is QEMU's own sentence.
    pub fn execute(&self, command: &str, arguments: Value) -> Result<Value, String> {
        let id = {
            let mut to = self.to.lock();
            to.1 += 1;
            let line = json!({"execute": command, "arguments": arguments, "id": to.1}).to_string() + "\n";
            to.0.write_all(line.as_bytes()).map_err(|e| format!("{command}: QEMU is gone: {e}"))?;
            to.1
        };
        self.heard
            .wait(ANSWER_WITHIN, |h| h.answers.remove(&id))
            .unwrap_or_else(|| Err(format!("{command}: no answer")))
    }

    /// Waits until an event was seen, from the start of the machine on.
    pub fn event(&self, within: Duration, is: impl Fn(&Value) -> bool) -> bool {
        self.heard.wait(within, |h| h.events.iter().any(&is).then_some(())).is_some()
    }
}

impl Drop for Qmp {
    fn drop(&mut self) {
        let _ = self.to.lock().0.shutdown(std::net::Shutdown::Both);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}
