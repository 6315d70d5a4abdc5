//! HTTP/1.1 by hand: faults need the socket.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use crate::api;
use crate::core::Core;
use crate::params::{Params, decode_form};
use crate::time;

/// Jetty's limit of a header, request line included.
const HEADER: usize = 8192;
/// `request.content.size`.
const BODY: usize = 1 << 20;
/// The connector's idle time.
const IDLE: Duration = Duration::from_secs(30);
/// How long a refused client may take to see it.
const LINGER: Duration = Duration::from_secs(1);

/// An answer on its way.
#[derive(Debug)]
pub(crate) struct Answer {
    pub status: u16,
    pub content: &'static str,
    pub body: Vec<u8>,
    pub end: End,
}

/// What becomes of the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// As the client wishes.
    Kept,
    /// Closed without an answer.
    Dropped,
    /// Reset without an answer.
    Reset,
    /// Closed after half of the body.
    Truncated,
}

impl Answer {
    pub fn json(status: u16, body: &serde_json::Value) -> Self {
        let content = "application/json; charset=UTF-8";
        Answer { status, content, body: body.to_string().into_bytes(), end: End::Kept }
    }

    pub fn html(status: u16) -> Self {
        let body = format!("<html>\r\n<head><title>{status}</title></head>\r\n<body>{status}</body>\r\n</html>\r\n");
        Answer { status, content: "text/html", body: body.into_bytes(), end: End::Kept }
    }

    pub fn without(end: End) -> Self {
        Answer { end, ..Answer::html(0) }
    }
}

/// Takes connections until the core ends; each has a thread.
pub(crate) fn serve(core: &Arc<Core>, listener: &TcpListener) {
    for stream in listener.incoming() {
        if core.world.lock().ending {
            return;
        }
        let Ok(stream) = stream else { continue };
        let Ok(copy) = stream.try_clone() else { continue };
        let of_the_thread = Arc::clone(core);
        let number = core.connected(copy);
        core.spawn("fakecloud-http", move || {
            // A client that goes is no event. One that is to see a reset must not see an end first.
            let reset = |e: io::Error| e.kind() == io::ErrorKind::ConnectionReset;
            if !converse(&of_the_thread, &stream).is_err_and(reset) {
                let _ = stream.shutdown(Shutdown::Both);
            }
            of_the_thread.disconnected(number);
        });
    }
}

fn converse(core: &Arc<Core>, stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(IDLE))?;
    stream.set_nodelay(true)?;
    let mut buffer = Vec::new();
    while let Some((method, params, keep)) = request(stream, &mut buffer)? {
        let refused = params.is_err();
        let answer = match params {
            Ok(params) => api::handle(core, &method, params),
            Err(status) => Answer::html(status),
        };
        let date = {
            let world = core.world.lock();
            world.dated.then(|| format!("Date: {}\r\n", time::http(time::now() + world.clock)))
        };
        if !write(stream, &answer, keep, date.as_deref().unwrap_or_default())? {
            return if refused { drain(stream) } else { Ok(()) };
        }
    }
    Ok(())
}

/// Reads what a refused request still has on its way: closed with bytes unread, a connection is
/// reset, and the client may never see the refusal.
fn drain(stream: &TcpStream) -> io::Result<()> {
    stream.shutdown(Shutdown::Write)?;
    stream.set_read_timeout(Some(LINGER))?;
    io::copy(&mut stream.take(4 << 20), &mut io::sink()).map(drop)
}

type Parsed = Option<(String, Result<Params, u16>, bool)>;

/// Reads one request; `None` at the end of the connection. `buffer` keeps what came after it.
fn request(mut stream: &TcpStream, buffer: &mut Vec<u8>) -> io::Result<Parsed> {
    let mut chunk = [0; 4096];
    let (head, method, target, length, form, keep, expect) = loop {
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut parsed = httparse::Request::new(&mut headers);
        match parsed.parse(buffer) {
            Ok(httparse::Status::Complete(head)) if head <= HEADER => {
                let value = |name: &str| {
                    let header = parsed.headers.iter().find(|h| h.name.eq_ignore_ascii_case(name))?;
                    std::str::from_utf8(header.value).ok().map(str::to_ascii_lowercase)
                };
                let chunked = value("transfer-encoding").is_some();
                let length = if chunked { None } else { value("content-length").unwrap_or_default().parse().ok() };
                let length = if chunked { None } else { Some(length.unwrap_or(0usize)) };
                let form = value("content-type").is_some_and(|t| t.starts_with("application/x-www-form-urlencoded"));
                let keep = parsed.version == Some(1) && value("connection").as_deref() != Some("close");
                let expect = value("expect").is_some_and(|e| e == "100-continue");
                let method = parsed.method.unwrap_or_default().to_owned();
                let target = parsed.path.unwrap_or_default().to_owned();
                break (head, method, target, length, form, keep, expect);
            }
            Ok(httparse::Status::Partial) if buffer.len() < HEADER => {}
            Ok(_) => return Ok(Some((String::new(), Err(431), false))),
            Err(_) => return Ok(Some((String::new(), Err(400), false))),
        }
        match stream.read(&mut chunk)? {
            0 => return Ok(None),
            n => buffer.extend_from_slice(&chunk[..n]),
        }
    };
    let Some(length) = length else { return Ok(Some((method, Err(411), false))) };
    if length > BODY {
        return Ok(Some((method, Err(413), false)));
    }
    if expect {
        stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
    }
    while buffer.len() < head + length {
        match stream.read(&mut chunk)? {
            0 => return Ok(None),
            n => buffer.extend_from_slice(&chunk[..n]),
        }
    }
    let body: Vec<u8> = buffer.drain(..head + length).skip(head).collect();
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    // The documented path, with or without the slash that some clients add.
    if path.trim_end_matches('/') != "/client/api" {
        return Ok(Some((method, Err(404), keep)));
    }
    if method != "GET" && method != "POST" {
        return Ok(Some((method, Err(405), keep)));
    }
    let mut raw = decode_form(query);
    if form {
        raw.extend(decode_form(&String::from_utf8_lossy(&body)));
    }
    Ok(Some((method, Ok(Params::new(raw)), keep)))
}

/// Writes the answer; whether the connection goes on.
fn write(mut stream: &TcpStream, answer: &Answer, keep: bool, date: &str) -> io::Result<bool> {
    match answer.end {
        End::Dropped => return Ok(false),
        End::Reset => {
            // Closed with this, it is reset.
            rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO))?;
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        End::Kept | End::Truncated => {}
    }
    let reason = match answer.status {
        200 => "OK",
        401 => "Unauthorized",
        404 => "Not Found",
        503 => "Service Unavailable",
        _ => "CloudStack",
    };
    let head = format!(
        "HTTP/1.1 {} {reason}\r\nContent-Type: {}\r\nContent-Length: {}\r\nX-Content-Type-Options: nosniff\r\n{date}{}\r\n",
        answer.status,
        answer.content,
        answer.body.len(),
        if keep { "" } else { "Connection: close\r\n" },
    );
    let mut bytes = head.into_bytes();
    let truncated = answer.end == End::Truncated;
    let shown = if truncated { answer.body.len() / 2 } else { answer.body.len() };
    bytes.extend_from_slice(&answer.body[..shown]);
    stream.write_all(&bytes)?;
    Ok(keep && !truncated)
}
