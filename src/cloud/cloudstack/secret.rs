//! Text that is never printed.

use std::fmt;

use zeroize::Zeroizing;

/// A secret: no `Display`, nothing in `Debug`, erased when dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// Takes the text over; the caller's buffer becomes the secret's.
    pub fn new(text: String) -> Self {
        Self(Zeroizing::new(text))
    }

    /// The text itself, to sign or send with, never to show.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(hidden)")
    }
}

/// What requests are signed with. Both are hidden: the API key alone signs nothing, but names the
/// account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    /// Sent with each request.
    pub api_key: Secret,
    /// Never sent.
    pub secret: Secret,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_not_shown() {
        let keys = Keys { api_key: Secret::new("kkk".into()), secret: Secret::new("sss".into()) };
        for text in [format!("{keys:?}"), format!("{keys:#?}")] {
            assert!(!text.contains("kkk") && !text.contains("sss"), "{text}");
        }
        assert_eq!(keys.secret.expose(), "sss");
    }
}
