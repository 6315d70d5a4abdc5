//! Apache CloudStack as a provider: the volumes of a host that is itself a VM of that cloud.
//!
//! ```text
//! trait Cloud ── CloudStack: what each call needs, and when its goal is reached
//!                   │                   │
//!                 jobs: submit, follow  │ looks
//!                   └─────────┬─────────┘
//!                          Client: signs, sends, tells failures apart; knows no volume
//! ```
//! "Page" in these files is shared/reference/cloudstack-api.md.
//!
//! | module | what it is |
//! |---|---|
//! | [`provider`] | the trait's calls, as CloudStack's |
//! | `create`, `marks`, `snapshots` | the longer ones of them |
//! | `jobs` | asynchronous jobs under ids of our own, never run twice |
//! | `rows`, `refusal` | the cloud's answers and noes, read; pure |
//! | [`answer`] | an HTTP reply as a value or an [`ApiError`]; pure |
//! | [`client`], `list` | one call: keys, signature, tries, deadline; all pages of a list |
//! | [`credentials`] | where the keys are, and reading them again |
//! | [`secret`] | text that is never printed |
//! | [`sign`] | the string that is signed, and the body that is sent; pure |
//! | [`whoami`] | which VM this host says it is |

pub mod answer;
pub mod client;
mod create;
pub mod credentials;
#[cfg(test)]
mod fuzz;
mod jobs;
mod list;
mod marks;
pub mod provider;
mod refusal;
mod rows;
pub mod secret;
pub mod sign;
mod snapshots;
mod transport;
pub mod whoami;

pub use answer::{ApiError, success};
pub use client::{Client, ClientOptions};
pub use credentials::Environment;
pub use provider::{CloudStack, Options, commands};
pub use sign::Signature;
