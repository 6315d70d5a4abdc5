//! The verbs that change an owner, each on objects of its own for each step.

use std::fs;

use crate::ground::Ground;

/// One verb, on objects of its own for each step.
pub struct Verb {
    pub name: &'static str,
    /// Makes what the n-th time is about; answers its volumes.
    pub make: fn(&Ground, usize) -> Vec<String>,
    /// Gives the command of the n-th time: to which file, and what.
    pub command: fn(&Ground, usize, &[String]) -> (String, String),
}

pub fn job(n: usize) -> String {
    format!("j{n}")
}

fn made(ground: &Ground, n: usize) -> Vec<String> {
    ground.volfs().job(&job(n), &["d"], ground.size())
}

pub const CREATE: Verb = Verb {
    name: "create",
    make: |ground, n| {
        fs::create_dir(ground.volfs().path(format!("jobs/{}", job(n)))).unwrap();
        Vec::new()
    },
    command: |_, n, _| (format!("jobs/{}/control", job(n)), "create d 1G".into()),
};

pub const CLAIM: Verb = Verb {
    name: "claim",
    make: |ground, n| {
        let ids = made(ground, n);
        assert_eq!(ground.volfs().write(control(&ids[0]), &format!("release {}", ids[0])), 0);
        ids
    },
    command: |_, n, ids| (format!("jobs/{}/control", job(n)), format!("claim {} d", ids[0])),
};

/// A claim of what another record has marked.
pub const TAKE: Verb = Verb {
    name: "claim",
    make: |ground, n| {
        fs::create_dir(ground.volfs().path(format!("jobs/{}", job(n)))).unwrap();
        ground.second.job("lost", &[&format!("l{n}")], ground.size())
    },
    command: |ground, n, ids| {
        let mark = ground.mark(&ids[0]).unwrap();
        let from = mark.split('/').next().unwrap();
        (format!("jobs/{}/control", job(n)), format!("claim {} d from={from}", ids[0]))
    },
};

pub const MOVE: Verb = Verb {
    name: "move",
    make: |ground, n| {
        fs::create_dir(ground.volfs().path(format!("jobs/{}to", job(n)))).unwrap();
        made(ground, n)
    },
    command: |_, n, ids| (control(&ids[0]), format!("move {}to", job(n))),
};

pub const RELEASE: Verb =
    Verb { name: "release", make: made, command: |_, _, ids| (control(&ids[0]), format!("release {}", ids[0])) };

pub const DELETE: Verb =
    Verb { name: "delete", make: made, command: |_, _, ids| (control(&ids[0]), format!("delete {}", ids[0])) };

pub const DESTROY: Verb = Verb {
    name: "destroy",
    make: |ground, n| {
        let ids = ground.volfs().job(&job(n), &["d", "e"], ground.size());
        assert_eq!(ground.volfs().write(control(&ids[0]), "attach"), 0, "{}", ground.volfs().log());
        ids
    },
    command: |_, n, _| (format!("jobs/{}/control", job(n)), format!("destroy {}", job(n))),
};

pub fn control(id: &str) -> String {
    format!("volumes/{id}/control")
}
