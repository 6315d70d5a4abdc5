//! One operation's calls: what identifies them, and the two wires between them and the operation.

use std::fmt;
use std::sync::Arc;

use tokio::sync::Notify;

use crate::model::Fence;

/// Goes with every call that changes something. One operation makes one, and all its calls share it.
#[derive(Clone)]
pub struct Call {
    fence: Fence,
    step: Arc<dyn Fn(&str) + Send + Sync>,
    hurry: Arc<Notify>,
}

impl Call {
    /// For the operation with this fence; `step` is told what is waited for.
    pub fn new(fence: Fence, step: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Call { fence, step: Arc::new(step), hurry: Arc::default() }
    }

    /// The operation's identity.
    pub fn fence(&self) -> Fence {
        self.fence
    }

    /// Names what is waited for, the cloud's job among it, for `info.json` and `operations/`.
    pub fn step(&self, words: &str) {
        (self.step)(words);
    }

    /// Says that the kernel shows what the call is to bring about: the cloud is asked at once.
    pub fn hurry(&self) {
        self.hurry.notify_one();
    }

    /// Waits for [`Call::hurry`]; one that came before counts.
    pub async fn hurried(&self) {
        self.hurry.notified().await;
    }
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Call").field("fence", &self.fence).finish_non_exhaustive()
    }
}
