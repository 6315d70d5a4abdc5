//! One POST and its reply, over TLS that is always verified.

use std::error::Error;
use std::path::Path;
use std::time::Duration;

use reqwest::{Certificate, Url, header, redirect};

use super::answer::{Again, Failure, Reply};

/// Shorter than the server's 30 s (page 1.1), so that a request seldom meets a closing connection.
const POOL_IDLE: Duration = Duration::from_secs(20);
/// Most connections kept idle.
const POOL_MOST: usize = 4;
/// Most bytes of a body: about a hundred thousand volumes a page, where 500 are asked for.
const BODY_MOST: usize = 64 << 20;

/// The way to the API.
#[derive(Debug)]
pub(super) struct Transport {
    http: reqwest::Client,
    endpoint: Url,
    ca: Option<String>,
}

impl Transport {
    /// Prepares connections. `ca` is a PEM file whose certificates replace the system's roots: who
    /// names the authority of this endpoint means that no other shall vouch for it.
    pub(super) fn new(endpoint: &str, ca: Option<&Path>, connect: Duration) -> Result<Self, String> {
        let endpoint = address(endpoint)?;
        // The first one stays; whoever came before us chose it for this process.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut http = reqwest::Client::builder()
            .user_agent(concat!("volfs/", env!("CARGO_PKG_VERSION")))
            .redirect(redirect::Policy::none())
            .retry(reqwest::retry::never())
            .referer(false)
            // Signed requests do not take a way that depends on who started the daemon.
            .no_proxy()
            .http1_only()
            .connect_timeout(connect)
            .tcp_nodelay(true)
            .pool_idle_timeout(POOL_IDLE)
            .pool_max_idle_per_host(POOL_MOST);
        match ca {
            Some(path) => http = http.tls_certs_only(certificates(path)?),
            // No roots are needed, and a machine without any can go on.
            None if endpoint.scheme() == "http" => http = http.tls_certs_only([]),
            None => {}
        }
        let http = http.build().map_err(|e| {
            format!("TLS cannot be set up: {} (install ca-certificates, or name your CA by ca)", chain(&e))
        })?;
        let ca = ca.map(|path| path.display().to_string());
        Ok(Self { http, endpoint, ca })
    }

    /// Where it goes, to be shown.
    pub(super) fn endpoint(&self) -> &str {
        self.endpoint.as_str()
    }

    /// Whether others on the way can read and change what is said: HTTP to another machine.
    pub(super) fn is_open(&self) -> bool {
        let here = |host: &str| host == "localhost" || host.starts_with("127.") || host == "[::1]";
        self.endpoint.scheme() == "http" && !self.endpoint.host_str().is_some_and(here)
    }

    /// Posts a form and takes the whole reply, all within `limit`.
    pub(super) async fn post(&self, form: String, limit: Duration) -> Result<Reply, Failure> {
        let request = self
            .http
            .post(self.endpoint.clone())
            .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded; charset=utf-8")
            .header(header::ACCEPT, "application/json")
            .timeout(limit)
            .body(form);
        let mut response = request.send().await.map_err(|e| self.failure(&e, limit))?;
        let text = |name| response.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
        let location = text(header::LOCATION).map(|l| l.split(['?', '#']).next().unwrap_or_default().to_owned());
        let mut reply =
            Reply { status: response.status().as_u16(), location, date: text(header::DATE), body: Vec::new() };
        while let Some(chunk) = response.chunk().await.map_err(|e| self.failure(&e, limit))? {
            if reply.body.len() + chunk.len() > BODY_MOST {
                return Err(Failure::no_answer(
                    format!("its answer is longer than {} MiB", BODY_MOST >> 20),
                    Again::Never,
                ));
            }
            reply.body.extend_from_slice(&chunk);
        }
        Ok(reply)
    }

    fn failure(&self, error: &reqwest::Error, limit: Duration) -> Failure {
        let words = chain(error);
        if let Some(tls) = cause::<rustls::Error>(error) {
            let words = self.tls_words(tls);
            // After the handshake the request may be there already.
            return if error.is_connect() {
                Failure::not_sent(words, Again::Never)
            } else {
                Failure::no_answer(words, Again::Lost)
            };
        }
        if error.is_connect() {
            return Failure::not_sent(format!("no connection: {words}"), Again::Connect);
        }
        if error.is_builder() {
            return Failure::not_sent(words, Again::Never);
        }
        if error.is_timeout() {
            return Failure::no_answer(format!("no answer within {:.1} s", limit.as_secs_f64()), Again::Lost);
        }
        Failure::no_answer(format!("the connection broke before the answer was complete: {words}"), Again::Lost)
    }

    fn tls_words(&self, error: &rustls::Error) -> String {
        if !matches!(error, rustls::Error::InvalidCertificate(_)) {
            return format!("no TLS connection: {error}");
        }
        match &self.ca {
            Some(path) => format!("its certificate is not trusted: {error}; only the CA in {path} (ca) is taken"),
            None => format!(
                "its certificate is not trusted: {error}; if it is of your own CA, name the CA's PEM file by ca in \
                 [cloudstack]"
            ),
        }
    }
}

fn address(endpoint: &str) -> Result<Url, String> {
    let bad = |why: &str| Err(format!("the CloudStack endpoint {why}; it is like https://cloud.example/client/api"));
    let Ok(url) = Url::parse(endpoint) else { return bad("is no URL") };
    if !matches!(url.scheme(), "http" | "https") {
        return bad("is neither https nor http");
    }
    if !url.username().is_empty() || url.password().is_some() {
        return bad("must not hold a user or password");
    }
    if url.query().is_some() || url.fragment().is_some() {
        return bad("must not hold ? or #");
    }
    Ok(url)
}

fn certificates(path: &Path) -> Result<Vec<Certificate>, String> {
    let shown = path.display();
    let pem = std::fs::read(path).map_err(|e| format!("{shown} with the CA (ca) cannot be read: {e}"))?;
    let found =
        Certificate::from_pem_bundle(&pem).map_err(|e| format!("{shown} (ca) is no PEM file: {}", chain(&e)))?;
    if found.is_empty() {
        return Err(format!("{shown} (ca) holds no certificate in PEM"));
    }
    Ok(found)
}

/// All errors below this one, said once each.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut words: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(e) = next {
        // The outermost of reqwest's only names the URL.
        let text = e.to_string();
        if !e.is::<reqwest::Error>() && !words.iter().any(|w| w.contains(&text)) {
            words.push(text);
        }
        next = e.source();
    }
    if words.is_empty() { error.to_string() } else { words.join(": ") }
}

/// The first cause of that type. An `io::Error` hides the error inside it from `source`.
fn cause<'a, T: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a T> {
    let mut next = Some(error);
    while let Some(e) = next {
        if let Some(found) = e.downcast_ref::<T>() {
            return Some(found);
        }
        let inside = e.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        if let Some(found) = inside.and_then(|i| cause::<T>(i)) {
            return Some(found);
        }
        next = e.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_a_plain_address() {
        for bad in
            ["", "cloud", "ftp://a/b", "https://u:p@a/client/api", "https://u@a/", "https://a/?x=1", "https://a/#b"]
        {
            let words = address(bad).unwrap_err();
            assert!(words.contains("endpoint") && !words.contains("u:p"), "{words}");
        }
        assert!(address("http://10.0.0.1:8080/client/api").is_ok());
    }

    #[test]
    fn http_is_open_unless_it_stays_on_this_machine() {
        let open = |e: &str| Transport::new(e, None, Duration::from_secs(1)).unwrap().is_open();
        assert!(open("http://10.0.0.1:8080/client/api"));
        assert!(!open("http://127.0.0.1:8080/client/api"));
        assert!(!open("http://localhost/client/api"));
    }

    #[test]
    fn a_ca_that_is_none_is_said() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let new = |path: &Path| Transport::new("https://a/b", Some(path), Duration::from_secs(1)).unwrap_err();
        assert!(new(file.path()).contains("holds no certificate"));
        assert!(new(Path::new("/no/such/ca.pem")).contains("/no/such/ca.pem"));
    }
}
