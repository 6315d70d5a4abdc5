use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::thread::JoinHandle;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

use super::*;

/// A TLS server for `localhost`, and the file of the CA that signed for it.
struct TlsServer {
    at: SocketAddr,
    dir: tempfile::TempDir,
    thread: Option<JoinHandle<()>>,
    stop: Arc<Mutex<bool>>,
}

fn authority(dir: &tempfile::TempDir, name: &str) -> (CertifiedIssuer<'static, KeyPair>, PathBuf) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let path = dir.path().join(format!("{name}.pem"));
    std::fs::write(&path, issuer.pem()).unwrap();
    (issuer, path)
}

impl TlsServer {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (issuer, _) = authority(&dir, "own");
        let key = KeyPair::generate().unwrap();
        let cert = CertificateParams::new(vec!["localhost".into()]).unwrap().signed_by(&key, &issuer).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![cert.der().clone()],
                PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
            )
            .unwrap();
        let config = Arc::new(config);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let stop = Arc::new(Mutex::new(false));
        let stopping = stop.clone();
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if *stopping.lock() {
                    return;
                }
                let stream = stream.unwrap();
                stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                let connection = rustls::ServerConnection::new(config.clone()).unwrap();
                let mut tls = BufReader::new(rustls::StreamOwned::new(connection, stream));
                let mut line = String::new();
                while tls.read_line(&mut line).is_ok_and(|n| n > 2) {
                    line.clear();
                }
                let head = format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", LISTED.len());
                let _ = tls.get_mut().write_all(format!("{head}{LISTED}").as_bytes());
                tls.get_mut().conn.send_close_notify();
                let _ = tls.get_mut().flush();
            }
        });
        Self { at, dir, thread: Some(thread), stop }
    }

    fn endpoint(&self, host: &str) -> String {
        format!("https://{host}:{}/client/api", self.at.port())
    }
}

impl Drop for TlsServer {
    fn drop(&mut self) {
        *self.stop.lock() = true;
        let _ = TcpStream::connect(self.at);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

#[tokio::test]
async fn an_own_ca_is_taken_by_path() {
    let server = TlsServer::start();
    let b = Bench::new(Vec::new());
    let mut o = options(&server.endpoint("localhost"));
    o.ca = Some(server.dir.path().join("own.pem"));
    let client = Client::with_pace(o, QUICK).unwrap();
    b.shown(client.read("listVolumes", &[]).await).unwrap();
}

#[tokio::test]
async fn an_unknown_ca_is_refused_and_the_option_named() {
    let server = TlsServer::start();
    let (_, other) = authority(&server.dir, "other");
    let b = Bench::new(Vec::new());
    let mut o = options(&server.endpoint("localhost"));
    o.ca = Some(other.clone());
    let client = Client::with_pace(o, QUICK).unwrap();
    let words = not_sent(b.shown(client.write("attachVolume", &[]).await));
    assert!(words.contains("not trusted") && words.contains(&other.display().to_string()), "{words}");
    assert!(!words.contains("tries"), "it was tried again: {words}");
    // Without the system's roots it does not even start, and says so.
    let words = match Client::with_pace(options(&server.endpoint("localhost")), QUICK) {
        Ok(client) => not_sent(b.shown(client.write("attachVolume", &[]).await)),
        Err(words) => words,
    };
    assert!(words.contains("by ca"), "{words}");
}

#[tokio::test]
async fn a_certificate_for_another_host_is_refused() {
    let server = TlsServer::start();
    let b = Bench::new(Vec::new());
    let mut o = options(&server.endpoint("127.0.0.1"));
    o.ca = Some(server.dir.path().join("own.pem"));
    let client = Client::with_pace(o, QUICK).unwrap();
    let words = not_sent(b.shown(client.read("listVolumes", &[]).await));
    assert!(words.contains("not trusted"), "{words}");
}
