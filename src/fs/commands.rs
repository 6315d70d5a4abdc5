//! Writes and the two namespace calls that do something: each parses everything, asks the engine,
//! and is answered now, or parked until there is an outcome.

use std::sync::Arc;
use std::time::Duration;

use fuser::{Generation, ReplyEmpty, ReplyEntry, ReplyWrite, Request};

use super::before::{Ask, RawReply};
use super::core::Core;
use super::inner::Inner;
use super::node::{JobFile, Node, RootFile};
use super::render;
use super::waiters::{CommandWait, Parked, Reply, Waits};
use super::{TTL, errno, who};
use crate::command::{self, Place};
use crate::engine::{Asker, Earlier, Target, Ticket};
use crate::error::{Errno, Error};
use crate::kept::Asked;
use crate::model::{Caller, JobId, JobRow, OpId, Verb};

/// The longest command, in bytes.
const COMMAND_MOST: usize = 4096;
/// The longest `vm_name`, in bytes.
const VM_NAME_MOST: usize = 255;
/// How long mkdir, rmdir and writes of values wait for the engine at most. It answers within the second
/// of rule R6, and takes back what it has refused: whoever were told before it could be told wrong.
const COMMIT_MOST: Duration = Duration::from_secs(10);

/// Who sent this request. The name is read while the caller waits for us, so it is still there.
pub fn caller(req: &Request) -> Caller {
    caller_of(req.uid(), req.gid(), req.pid())
}

fn caller_of(uid: u32, gid: u32, pid: u32) -> Caller {
    let comm = match pid {
        0 => Vec::new(),
        pid => std::fs::read(format!("/proc/{pid}/comm")).unwrap_or_default(),
    };
    let comm = String::from_utf8_lossy(&comm).trim_end_matches('\n').to_owned();
    Caller { uid, gid, pid, comm }
}

/// The verb as it was given, for `error`: the first word, bounded.
fn word(data: &[u8]) -> String {
    let text = String::from_utf8_lossy(&data[..data.len().min(64)]);
    let first = text.split_whitespace().next().unwrap_or("-");
    render::escape(first).chars().take(32).collect()
}

/// A command as it was written.
struct Written {
    node: Node,
    target: Target,
    data: Vec<u8>,
    nonblock: bool,
}

impl Inner {
    /// WRITE. The offset is nobody's business: every write is a whole command or value.
    pub fn write(self: &Arc<Self>, req: &Request, node: Node, data: &[u8], nonblock: bool, reply: ReplyWrite) {
        let caller = caller(req);
        match node {
            Node::Control(target, _) => {
                let ask = self.ask(node, who(req), caller, Some(&data[..data.len().min(COMMAND_MOST + 1)]));
                let written = Written { node, target, data: data.to_vec(), nonblock };
                self.command(written, ask, Reply::Write(reply, length(data)));
            }
            Node::Job(row, JobFile::VmName) => self.vm_name(req, node, row, data, caller, reply),
            Node::Job(row, JobFile::Hold) => self.hold(req, node, row, data, caller, reply),
            _ => reply.error(errno(Errno::EACCES)),
        }
    }

    /// A command that the daemon before had read and that the kernel cannot send again.
    pub fn command_again(self: &Arc<Self>, place: u64, asked: &Asked, reply: RawReply) {
        let (Some(node @ Node::Control(target, _)), Some(data)) = (Node::parse(asked.node), asked.command.clone())
        else {
            return reply.error(Errno::EIO);
        };
        let caller = caller_of(asked.uid, asked.gid, asked.pid);
        let ask = self.ask_again(place, asked, caller);
        // Neither admitted nor in the journal: it may be one that was refused and answered in the very
        // moment of the crash, and nothing is begun for a caller that may have gone on.
        if ask.earlier.is_none() && !asked.waits {
            return reply.error(Errno::EIO);
        }
        let reply = Reply::Raw(reply, length(&data));
        self.command(Written { node, target, data, nonblock: false }, ask, reply);
    }

    /// Answers from what became of it before, or gives it to the engine.
    fn command(self: &Arc<Self>, written: Written, mut ask: Ask, reply: Reply) {
        let place = match written.target {
            Target::Root => Place::Root,
            Target::Job(_) => Place::Job,
            Target::Volume(_) => Place::Volume,
        };
        let parsed = if written.data.len() > COMMAND_MOST {
            let what = format!("a command has at most {COMMAND_MOST} bytes, this one more");
            Err(Error::Malformed { what })
        } else {
            command::parse(&written.data, place)
        };
        let nowait = written.nonblock || parsed.as_ref().is_ok_and(|command| command.nowait);
        match ask.earlier.take() {
            Some(Earlier::Done(_)) => return reply.done(),
            Some(Earlier::Failed(e)) => return reply.error(e),
            // It is in the journal, and more was not asked for.
            Some(Earlier::Running { .. }) if nowait => return reply.done(),
            Some(Earlier::Running { ticket, op, verb }) => {
                let most = parsed.as_ref().ok().and_then(|c| c.timeout).map_or(verb.default_timeout(), Some);
                return self.when_settled(written, ask, reply, (ticket, op, verb), most.filter(|t| !t.is_zero()));
            }
            Some(Earlier::NotBegun) | None => {}
        }
        let Written { node, target, data, .. } = written;
        let world = self.core.world();
        let there = match target {
            Target::Root => true,
            Target::Job(row) => world.jobs.contains_key(&row),
            Target::Volume(row) => world.volumes.contains_key(&row),
        };
        // Held open while the object was released, moved or forgotten (rule R4).
        if !there {
            return reply.error(Errno::ENODEV);
        }
        let mut command = match parsed {
            Ok(command) => command,
            Err(e) => {
                self.core.note_failure(target, &word(&data), &ask.asker.caller, &e);
                return reply.error(e.errno());
            }
        };
        command.nowait = nowait;
        let verb = command.action.verb();
        let Ask { asker, kept, waited, .. } = ask;
        let caller = asker.caller.clone();
        let fence = asker.fence;
        let submitted = self.core.submit(target, command, asker);
        if let Some(joined) = submitted.fence.filter(|of| *of != fence) {
            kept.joined(joined.0);
        }
        if submitted.ticket.outcome().is_none() {
            kept.waits();
        }
        let most = submitted.deadline.map(|most| most.saturating_sub(Duration::from_millis(waited)));
        let pid = caller.pid;
        let wait = CommandWait { target, verb, op: submitted.op, caller };
        let parked = Parked { reply, waits: Waits::Command(Box::new(wait)), pid, most, node: node.id(), kept };
        self.when_done(parked, submitted.ticket, |_, reply, ()| reply.done());
    }

    /// Waits for an operation that a crash left behind. Where nothing of it had begun, its living
    /// caller's command is given again.
    fn when_settled(
        self: &Arc<Self>,
        written: Written,
        ask: Ask,
        reply: Reply,
        (ticket, op, verb): (Ticket, OpId, Verb),
        most: Option<Duration>,
    ) {
        let Ask { asker, kept, waited, .. } = ask;
        let most = most.map(|most| most.saturating_sub(Duration::from_millis(waited)));
        let wait = CommandWait { target: written.target, verb, op: Some(op), caller: asker.caller.clone() };
        let (waits, pid, node) = (Waits::Command(Box::new(wait)), asker.caller.pid, written.node.id());
        let key = self.waiters.park(Parked { reply, waits, pid, most, node, kept });
        let inner = Arc::downgrade(self);
        ticket.on_done(move |outcome| {
            let Some(inner) = inner.upgrade() else { return };
            let Some(Parked { reply, kept, .. }) = inner.waiters.take(key) else { return };
            match outcome {
                Ok(()) => reply.done(),
                Err(Error::LeftBehind { .. }) => {
                    let asker = Asker::from(asker.caller);
                    kept.joined(asker.fence.0);
                    inner.command(written, Ask { asker, kept, earlier: None, waited }, reply);
                }
                Err(e) => reply.error(e.errno()),
            }
        });
    }

    /// Answers the request when the ticket is done: `answer` for success, else the error's errno.
    fn when_done<T: Clone + Send + 'static>(
        self: &Arc<Self>,
        parked: Parked,
        ticket: Ticket<T>,
        answer: impl FnOnce(&Self, Reply, T) + Send + 'static,
    ) {
        match ticket.outcome() {
            Some(Ok(done)) => return answer(self, parked.reply, done),
            Some(Err(e)) => return parked.reply.error(e.errno()),
            None => {}
        }
        let key = self.waiters.park(parked);
        let inner = Arc::downgrade(self);
        ticket.on_done(move |outcome| {
            let Some(inner) = inner.upgrade() else { return };
            // Not there: its caller has left, and was answered.
            let Some(Parked { reply, kept: _kept, .. }) = inner.waiters.take(key) else { return };
            match outcome {
                Ok(done) => answer(&inner, reply, done.clone()),
                Err(e) => reply.error(e.errno()),
            }
        });
    }

    /// A change that is journaled and done in one commit, or was by the daemon before.
    fn small<T: Clone + Send + 'static>(
        self: &Arc<Self>,
        node: Node,
        ask: Ask,
        reply: Reply,
        give: impl FnOnce(&dyn Core, Asker) -> Ticket<T>,
        answer: impl FnOnce(&Self, Reply, T) + Send + 'static,
        done: impl FnOnce(&Self, Reply, Option<JobRow>),
    ) {
        let Ask { asker, kept, earlier, .. } = ask;
        match earlier {
            Some(Earlier::Done(row)) => return done(self, reply, row),
            Some(Earlier::Failed(e)) => return reply.error(e),
            _ => {}
        }
        let pid = asker.caller.pid;
        let ticket = give(&*self.core, asker);
        let parked = Parked { reply, waits: Waits::Commit, pid, most: Some(COMMIT_MOST), node: node.id(), kept };
        self.when_done(parked, ticket, answer);
    }

    fn refuse(&self, target: Target, verb: &str, caller: &Caller, e: &Error) -> Errno {
        self.core.note_failure(target, verb, caller, e);
        e.errno()
    }

    fn vm_name(
        self: &Arc<Self>,
        req: &Request,
        node: Node,
        row: JobRow,
        data: &[u8],
        caller: Caller,
        reply: ReplyWrite,
    ) {
        if !self.core.world().jobs.contains_key(&row) {
            return reply.error(errno(Errno::ENODEV));
        }
        let value = match vm_name(data) {
            Ok(value) => value,
            Err(what) => {
                let e = Error::Malformed { what: format!("vm_name {what}") };
                return reply.error(errno(self.refuse(Target::Job(row), "vm_name", &caller, &e)));
            }
        };
        let ask = self.ask(node, who(req), caller, None);
        self.value_set(node, ask, data, reply, |core, asker| core.set_vm_name(row, value, asker));
    }

    fn hold(self: &Arc<Self>, req: &Request, node: Node, row: JobRow, data: &[u8], caller: Caller, reply: ReplyWrite) {
        let world = self.core.world();
        let Some(job) = world.jobs.get(&row) else { return reply.error(errno(Errno::ENODEV)) };
        let wanted = match data.strip_suffix(b"\n").unwrap_or(data) {
            b"0" => Ok(false),
            b"1" => Ok(true),
            _ => Err(Error::Malformed { what: "hold is 0 or 1".into() }),
        };
        let checked = wanted.and_then(|on| {
            let lowers = job.hold.0 && !on;
            if lowers && !caller.is_root() { Err(Error::RootOnly { what: "lowering hold" }) } else { Ok(on) }
        });
        let on = match checked {
            Ok(on) => on,
            Err(e) => return reply.error(errno(self.refuse(Target::Job(row), "hold", &caller, &e))),
        };
        let ask = self.ask(node, who(req), caller, None);
        self.value_set(node, ask, data, reply, |core, asker| core.set_hold(row, on, asker));
    }

    fn value_set(
        self: &Arc<Self>,
        node: Node,
        ask: Ask,
        data: &[u8],
        reply: ReplyWrite,
        give: impl FnOnce(&dyn Core, Asker) -> Ticket,
    ) {
        let reply = Reply::Write(reply, length(data));
        self.small(node, ask, reply, give, |_, reply, ()| reply.done(), |_, reply, _| reply.done());
    }

    /// MKDIR: a job, in `jobs/` only.
    pub fn mkdir(self: &Arc<Self>, req: &Request, parent: Node, name: &str, reply: ReplyEntry) {
        if parent != Node::Root(RootFile::Jobs) {
            return reply.error(errno(Errno::EPERM));
        }
        let caller = caller(req);
        let id = match JobId::parse(name) {
            Ok(id) => id,
            Err(e) => return reply.error(errno(self.refuse(Target::Root, "mkdir", &caller, &e.into()))),
        };
        let made = |inner: &Self, reply: Reply, row: Option<JobRow>| match (reply, row) {
            (Reply::Entry(reply), Some(row)) => {
                reply.entry(&TTL, &inner.new_dir(Node::Job(row, JobFile::Dir)), Generation(0));
            }
            (other, _) => other.error(Errno::EIO),
        };
        let ask = self.ask(parent, who(req), caller, None);
        let give = |core: &dyn Core, asker| core.make_job(id, asker);
        self.small(parent, ask, Reply::Entry(reply), give, move |i, r, row| made(i, r, Some(row)), made);
    }

    /// RMDIR: forgets a job that owns nothing.
    pub fn rmdir(self: &Arc<Self>, req: &Request, parent: Node, name: &str, reply: ReplyEmpty) {
        if parent != Node::Root(RootFile::Jobs) {
            return reply.error(errno(Errno::EPERM));
        }
        let ask = self.ask(parent, who(req), caller(req), None);
        let world = self.core.world();
        let row = JobId::parse(name).ok().and_then(|id| world.job_rows.get(&id).copied());
        // The daemon before may have forgotten it for this very request.
        let Some(row) = row.or(ask.earlier.as_ref().map(|_| JobRow(0))) else {
            return reply.error(errno(Errno::ENOENT));
        };
        let give = |core: &dyn Core, asker| core.forget_job(row, asker);
        let reply = Reply::Empty(reply);
        self.small(parent, ask, reply, give, |_, reply, ()| reply.done(), |_, reply, _| reply.done());
    }
}

fn length(data: &[u8]) -> u32 {
    // A write of the kernel has at most 16 MiB.
    u32::try_from(data.len()).unwrap_or(u32::MAX)
}

/// The value of one write to `vm_name`, or what is wrong with it.
fn vm_name(data: &[u8]) -> Result<String, &'static str> {
    let line = data.strip_suffix(b"\n").unwrap_or(data);
    let text = std::str::from_utf8(line).map_err(|_| "is not UTF-8")?;
    if text.len() > VM_NAME_MOST {
        return Err("has at most 255 bytes");
    }
    if text.chars().any(char::is_control) {
        return Err("is one line without control characters");
    }
    Ok(text.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_name_is_one_line_of_text() {
        assert_eq!(vm_name(b"web 01\n"), Ok("web 01".into()));
        assert_eq!(vm_name(b"web"), Ok("web".into()));
        assert_eq!(vm_name(b"\n"), Ok(String::new()));
        assert!(vm_name(b"a\nb\n").is_err());
        assert!(vm_name(b"a\tb").is_err());
        assert!(vm_name(b"\xff").is_err());
        assert!(vm_name(&[b'a'; 256]).is_err());
        assert!(vm_name(&[b'a'; 255]).is_ok());
    }

    #[test]
    fn the_word_of_what_does_not_parse_is_short_and_printable() {
        assert_eq!(word(b"atach now\n"), "atach");
        assert_eq!(word(b"\n"), "-");
        assert_eq!(word(b"a\x01b"), "a\\001b");
        assert!(word(&[b'x'; 5000]).len() <= 32);
    }
}
