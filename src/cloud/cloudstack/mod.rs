//! Apache CloudStack as a provider: the volumes of a host that is itself a VM of that cloud.
//!
//! [`Client`] signs, sends and reads; it knows no volume. What a command means is above it.
//!
//! | module | what it is |
//! |---|---|
//! | [`answer`] | an HTTP reply as a value or an [`ApiError`]; pure |
//! | [`client`] | one call: keys, signature, tries, deadline |
//! | [`credentials`] | where the keys are, and reading them again |
//! | [`secret`] | text that is never printed |
//! | [`sign`] | the string that is signed, and the body that is sent; pure |

pub mod answer;
pub mod client;
pub mod credentials;
mod list;
pub mod secret;
pub mod sign;
mod transport;

pub use answer::{ApiError, success};
pub use client::{Client, ClientOptions};
pub use credentials::Environment;
pub use sign::Signature;
