//! Writes and the two namespace calls that do something: each parses everything, asks the engine,
//! and is answered now, or parked until there is an outcome.

use std::sync::Arc;
use std::time::Duration;

use fuser::{Generation, ReplyEmpty, ReplyEntry, ReplyWrite, Request};

use super::inner::Inner;
use super::node::{JobFile, Node, RootFile};
use super::render;
use super::waiters::{CommandWait, Parked, Reply, Waits};
use super::{TTL, errno};
use crate::command::{self, Place};
use crate::engine::{Target, Ticket};
use crate::error::{Errno, Error};
use crate::model::{Caller, JobId, JobRow};

/// The longest command, in bytes.
const COMMAND_MOST: usize = 4096;
/// The longest `vm_name`, in bytes.
const VM_NAME_MOST: usize = 255;
/// How long mkdir, rmdir and writes of values wait for the record (rule R6: at most 1 s), less the
/// watcher's round.
const COMMIT_MOST: Duration = Duration::from_millis(950);

/// Who sent this request. The name is read while the caller waits for us, so it is still there.
pub fn caller(req: &Request) -> Caller {
    let comm = match req.pid() {
        0 => Vec::new(),
        pid => std::fs::read(format!("/proc/{pid}/comm")).unwrap_or_default(),
    };
    let comm = String::from_utf8_lossy(&comm).trim_end_matches('\n').to_owned();
    Caller { uid: req.uid(), gid: req.gid(), pid: req.pid(), comm }
}

/// The verb as it was given, for `error`: the first word, bounded.
fn word(data: &[u8]) -> String {
    let text = String::from_utf8_lossy(&data[..data.len().min(64)]);
    let first = text.split_whitespace().next().unwrap_or("-");
    render::escape(first).chars().take(32).collect()
}

impl Inner {
    /// WRITE. The offset is nobody's business: every write is a whole command or value.
    pub fn write(self: &Arc<Self>, req: &Request, node: Node, data: &[u8], nonblock: bool, reply: ReplyWrite) {
        let caller = caller(req);
        match node {
            Node::Control(target, _) => self.command(node, target, data, nonblock, caller, reply),
            Node::Job(row, JobFile::VmName) => self.vm_name(node, row, data, caller, reply),
            Node::Job(row, JobFile::Hold) => self.hold(node, row, data, caller, reply),
            _ => reply.error(errno(Errno::EACCES)),
        }
    }

    fn command(
        self: &Arc<Self>,
        node: Node,
        target: Target,
        data: &[u8],
        nonblock: bool,
        caller: Caller,
        reply: ReplyWrite,
    ) {
        let world = self.core.world();
        let (there, place) = match target {
            Target::Root => (true, Place::Root),
            Target::Job(row) => (world.jobs.contains_key(&row), Place::Job),
            Target::Volume(row) => (world.volumes.contains_key(&row), Place::Volume),
        };
        // Held open while the object was released, moved or forgotten (rule R4).
        if !there {
            return reply.error(errno(Errno::ENODEV));
        }
        let parsed = if data.len() > COMMAND_MOST {
            Err(Error::Malformed {
                what: format!("a command has at most {COMMAND_MOST} bytes, this one {}", data.len()),
            })
        } else {
            command::parse(data, place)
        };
        let mut command = match parsed {
            Ok(command) => command,
            Err(e) => {
                self.core.note_failure(target, &word(data), &caller, &e);
                return reply.error(errno(e.errno()));
            }
        };
        command.nowait |= nonblock;
        let verb = command.action.verb();
        let submitted = self.core.submit(target, command, caller.clone());
        let reply = Reply::Write(reply, length(data));
        let pid = caller.pid;
        let wait = CommandWait { target, verb, op: submitted.op, caller };
        self.when_done(
            node,
            pid,
            submitted.deadline,
            Waits::Command(Box::new(wait)),
            reply,
            submitted.ticket,
            |_, reply, ()| {
                reply.done();
            },
        );
    }

    /// Answers the request when the ticket is done: `answer` for success, else the error's errno.
    #[allow(clippy::too_many_arguments)]
    fn when_done<T: Clone + Send + 'static>(
        self: &Arc<Self>,
        node: Node,
        pid: u32,
        most: Option<Duration>,
        waits: Waits,
        reply: Reply,
        ticket: Ticket<T>,
        answer: impl FnOnce(&Self, Reply, T) + Send + 'static,
    ) {
        match ticket.outcome() {
            Some(Ok(done)) => return answer(self, reply, done),
            Some(Err(e)) => return reply.error(e.errno()),
            None => {}
        }
        let key = self.waiters.park(Parked { reply, waits, pid, most, node: node.id() });
        let inner = Arc::downgrade(self);
        ticket.on_done(move |outcome| {
            let Some(inner) = inner.upgrade() else { return };
            // Not there: its caller has left, and was answered.
            let Some(parked) = inner.waiters.take(key) else { return };
            match outcome {
                Ok(done) => answer(&inner, parked.reply, done.clone()),
                Err(e) => parked.reply.error(e.errno()),
            }
        });
    }

    fn refuse(&self, target: Target, verb: &str, caller: &Caller, e: &Error) -> Errno {
        self.core.note_failure(target, verb, caller, e);
        e.errno()
    }

    fn vm_name(self: &Arc<Self>, node: Node, row: JobRow, data: &[u8], caller: Caller, reply: ReplyWrite) {
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
        let (pid, ticket) = (caller.pid, self.core.set_vm_name(row, value, caller));
        self.value_set(node, pid, data, reply, ticket);
    }

    fn hold(self: &Arc<Self>, node: Node, row: JobRow, data: &[u8], caller: Caller, reply: ReplyWrite) {
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
        let (pid, ticket) = (caller.pid, self.core.set_hold(row, on, caller));
        self.value_set(node, pid, data, reply, ticket);
    }

    fn value_set(self: &Arc<Self>, node: Node, pid: u32, data: &[u8], reply: ReplyWrite, ticket: Ticket) {
        let reply = Reply::Write(reply, length(data));
        self.when_done(node, pid, Some(COMMIT_MOST), Waits::Commit, reply, ticket, |_, reply, ()| reply.done());
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
        let (pid, ticket) = (caller.pid, self.core.make_job(id, caller));
        self.when_done(
            parent,
            pid,
            Some(COMMIT_MOST),
            Waits::Commit,
            Reply::Entry(reply),
            ticket,
            |inner, reply, row| match reply {
                Reply::Entry(reply) => {
                    reply.entry(&TTL, &inner.new_dir(Node::Job(row, JobFile::Dir)), Generation(0));
                }
                other => other.error(Errno::EIO),
            },
        );
    }

    /// RMDIR: forgets a job that owns nothing.
    pub fn rmdir(self: &Arc<Self>, req: &Request, parent: Node, name: &str, reply: ReplyEmpty) {
        if parent != Node::Root(RootFile::Jobs) {
            return reply.error(errno(Errno::EPERM));
        }
        let world = self.core.world();
        let Some(row) = JobId::parse(name).ok().and_then(|id| world.job_rows.get(&id).copied()) else {
            return reply.error(errno(Errno::ENOENT));
        };
        let caller = caller(req);
        let (pid, ticket) = (caller.pid, self.core.forget_job(row, caller));
        let reply = Reply::Empty(reply);
        self.when_done(parent, pid, Some(COMMIT_MOST), Waits::Commit, reply, ticket, |_, reply, ()| reply.done());
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
