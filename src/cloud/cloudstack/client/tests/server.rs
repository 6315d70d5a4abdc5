//! A server of canned answers, one after the other; the last one repeats.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::super::sign::{self, Algorithm};

/// What is done with a request.
#[derive(Clone)]
pub(super) enum Act {
    /// Status, content type, further header lines, body.
    Reply(u16, &'static str, String, String),
    /// The same JSON with a `Date`.
    Dated(u16, &'static str, &'static str),
    /// A TCP reset.
    Reset,
    /// A body shorter than its Content-Length.
    Half(&'static str),
    /// A body that ends with the connection, too early.
    Cut(&'static str),
    /// Nothing, until the client goes.
    Silent,
    /// An answer after a while.
    Late(Duration, &'static str),
    /// An answer, and the connection closed behind it without saying so.
    Closing(&'static str),
    /// A redirect to that place.
    Redirect(u16, String),
    /// A body that goes on until the client goes.
    Endless,
    /// A page whose title is the request's body.
    Echo,
    /// 200 if the signature is right by this hash, else 401.
    Signed(Algorithm),
}

impl Act {
    pub(super) fn json(status: u16, body: &str) -> Self {
        Act::Reply(status, "application/json; charset=UTF-8", String::new(), body.into())
    }

    pub(super) fn html(status: u16, body: &str) -> Self {
        Act::Reply(status, "text/html", String::new(), body.into())
    }
}

/// A request's form, decoded.
pub(super) type Form = BTreeMap<String, String>;

struct Seen {
    at: Instant,
    head: String,
    form: Form,
}

#[derive(Default)]
struct Shared {
    script: Mutex<VecDeque<Act>>,
    seen: Mutex<Vec<Seen>>,
    streams: Mutex<Vec<TcpStream>>,
    stopping: Mutex<bool>,
    arrived: tokio::sync::Notify,
}

/// Runs until it is dropped.
pub(super) struct Server {
    at: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub(super) fn start(script: Vec<Act>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let shared = Arc::new(Shared { script: Mutex::new(script.into()), ..Shared::default() });
        let own = shared.clone();
        let thread = std::thread::spawn(move || {
            let mut threads = Vec::new();
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                let stopping = own.stopping.lock();
                if *stopping {
                    break;
                }
                own.streams.lock().push(stream.try_clone().unwrap());
                let own = own.clone();
                threads.push(std::thread::spawn(move || serve(&own, stream)));
            }
            threads.into_iter().for_each(|t| drop(t.join()));
        });
        Self { at, shared, thread: Some(thread) }
    }

    pub(super) fn endpoint(&self) -> String {
        format!("http://{}/client/api", self.at)
    }

    pub(super) fn requests(&self) -> Vec<Form> {
        self.shared.seen.lock().iter().map(|s| s.form.clone()).collect()
    }

    pub(super) fn commands(&self) -> Vec<String> {
        self.requests().iter().map(|form| form["command"].clone()).collect()
    }

    pub(super) fn heads(&self) -> Vec<String> {
        self.shared.seen.lock().iter().map(|s| s.head.clone()).collect()
    }

    pub(super) fn lines(&self) -> Vec<String> {
        self.heads().iter().map(|h| h.lines().next().unwrap_or_default().to_owned()).collect()
    }

    pub(super) fn connections(&self) -> usize {
        self.shared.streams.lock().len()
    }

    /// The time between two requests.
    pub(super) fn gap(&self, one: usize, two: usize) -> Duration {
        let seen = self.shared.seen.lock();
        seen[two].at - seen[one].at
    }

    /// Returns when so many requests have come.
    pub(super) async fn wait_for(&self, requests: usize) {
        let enough = async {
            loop {
                let next = self.shared.arrived.notified();
                if self.shared.seen.lock().len() >= requests {
                    return;
                }
                next.await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), enough).await.expect("the request did not come");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        *self.shared.stopping.lock() = true;
        for stream in self.shared.streams.lock().iter() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        let _ = TcpStream::connect(self.at);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn serve(shared: &Shared, stream: TcpStream) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    while let Some((head, body)) = request(&mut reader) {
        let form = decode(&body);
        let act = {
            let mut script = shared.script.lock();
            let next = if script.len() > 1 { script.pop_front() } else { script.front().cloned() };
            next.unwrap_or_else(|| Act::html(500, "<html>the script is empty</html>"))
        };
        shared.seen.lock().push(Seen { at: Instant::now(), head, form: form.clone() });
        shared.arrived.notify_waiters();
        if !perform(act, &stream, &form, &body) {
            return;
        }
    }
}

/// Head and body of the next request, if one comes.
fn request(reader: &mut impl BufRead) -> Option<(String, String)> {
    let mut head = String::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        if line.trim_end().is_empty() {
            break;
        }
        head.push_str(&line);
    }
    let length = head.lines().find_map(|l| {
        let (name, value) = l.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    let mut body = vec![0; length?];
    reader.read_exact(&mut body).ok()?;
    Some((head, String::from_utf8(body).ok()?))
}

/// Whether the connection goes on.
fn perform(act: Act, mut stream: &TcpStream, form: &Form, body: &str) -> bool {
    let reply = |status: u16, kind: &str, more: &str, body: &str| {
        format!("HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n{more}\r\n{body}", body.len())
    };
    let json = |status, body| reply(status, "application/json", "", body);
    let mut say = |text: String| stream.write_all(text.as_bytes()).is_ok();
    match act {
        Act::Reply(status, kind, more, body) => say(reply(status, kind, &more, &body)),
        Act::Dated(status, body, date) => say(reply(status, "application/json", &format!("Date: {date}\r\n"), body)),
        Act::Reset => {
            rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO)).unwrap();
            false
        }
        Act::Half(half) => {
            say(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{half}", half.len() + 10));
            let _ = stream.shutdown(Shutdown::Both);
            false
        }
        Act::Cut(half) => {
            say(format!("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{half}"));
            let _ = stream.shutdown(Shutdown::Both);
            false
        }
        Act::Silent => {
            let _ = stream.read(&mut [0]);
            false
        }
        Act::Late(wait, body) => {
            std::thread::sleep(wait);
            say(json(200, body))
        }
        Act::Closing(body) => {
            say(json(200, body));
            let _ = stream.shutdown(Shutdown::Both);
            false
        }
        Act::Redirect(status, to) => say(reply(status, "text/html", &format!("Location: {to}\r\n"), "")),
        Act::Endless => {
            let mut more = say("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".into());
            let chunk = format!("100000\r\n{}\r\n", " ".repeat(1 << 20));
            while more {
                more = say(chunk.clone());
            }
            false
        }
        Act::Echo => say(reply(502, "text/html", "", &format!("<html><title>bad {body} bad</title></html>"))),
        Act::Signed(algorithm) => {
            let own: Vec<(&str, &str)> =
                form.iter().filter(|(n, _)| *n != "signature").map(|(n, v)| (n.as_str(), v.as_str())).collect();
            match form["signature"] == sign::signature(&own, super::SECRET, algorithm) {
                true => say(json(200, r#"{"r":{"capability":{}}}"#)),
                false => say(json(401, super::BAD_SIGNATURE)),
            }
        }
    }
}

fn decode(body: &str) -> Form {
    let text = |part: &str| {
        let mut bytes = part.bytes();
        let mut out = Vec::new();
        while let Some(b) = bytes.next() {
            match b {
                b'%' => {
                    let hex: String = bytes.by_ref().take(2).map(char::from).collect();
                    out.push(u8::from_str_radix(&hex, 16).unwrap());
                }
                b'+' => out.push(b' '),
                b => out.push(b),
            }
        }
        String::from_utf8(out).unwrap()
    };
    body.split('&').filter_map(|pair| pair.split_once('=')).map(|(n, v)| (text(n), text(v))).collect()
}

/// A listener whose queue is full: the kernel drops what else wants to connect.
pub(super) struct Full {
    at: SocketAddr,
    _listener: OwnedFd,
    _waiting: Vec<TcpStream>,
}

impl Full {
    pub(super) fn new() -> Self {
        use rustix::net::{AddressFamily, SocketType, bind, getsockname, listen, socket};
        let listener = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        bind(&listener, &"127.0.0.1:0".parse::<SocketAddr>().unwrap()).unwrap();
        listen(&listener, 0).unwrap();
        let at = SocketAddr::try_from(getsockname(&listener).unwrap()).unwrap();
        let mut waiting = Vec::new();
        while let Ok(stream) = TcpStream::connect_timeout(&at, Duration::from_millis(200)) {
            waiting.push(stream);
            assert!(waiting.len() < 64, "the queue does not fill");
        }
        Self { at, _listener: listener, _waiting: waiting }
    }

    pub(super) fn endpoint(&self) -> String {
        format!("http://{}/client/api", self.at)
    }
}
