#!/usr/bin/env python3
"""What volfs costs, as ratios and counts measured in one run on this machine.

    benches/measure.py [--volumes N] [--json FILE]

As root, in the checkout. Builds the release binary with its failpoints (to hold commands), mounts
trees of its own in a temporary directory, and takes them down again. Times are medians; compare
them with their floor of the same run, not between machines.
"""
import argparse, fcntl, json, os, re, select, shutil, signal, statistics, struct, subprocess, sys, tempfile, threading, time

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(HERE)
BIN = os.path.join(TOP, "target", "release", "volfs")
rows = []


def say(what, value, unit, goal=None, note=""):
    rows.append({"what": what, "value": value, "unit": unit, "goal": goal, "note": note})
    goal = "" if goal is None else f"  (goal {goal})"
    print(f"{what:58} {value:>12.4g} {unit}{goal}  {note}", flush=True)


class Tree:
    """One daemon over a state directory."""

    def __init__(self, top, env=None, log="warn"):
        self.top, self.mnt, self.state = top, os.path.join(top, "mnt"), os.path.join(top, "state")
        self.log = os.path.join(top, "log")
        os.makedirs(self.mnt, exist_ok=True)
        self.start(env, log)

    def start(self, env=None, log="warn"):
        began = time.monotonic()
        with open(self.log, "ab") as err:
            self.child = subprocess.Popen(
                [BIN, "--state-dir", self.state, "--log", log, "mount", self.mnt, "--background-child"],
                env={**os.environ, **(env or {})}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=err)
        line = self.child.stdout.readline().strip()
        assert line == b"ready", (line, open(self.log).read()[-2000:])
        return time.monotonic() - began

    def stop(self):
        self.child.send_signal(signal.SIGTERM)
        self.child.wait(30)

    def path(self, below):
        return os.path.join(self.mnt, below)

    def write(self, below, text):
        fd = os.open(self.path(below), os.O_WRONLY)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)

    def read(self, below):
        with open(self.path(below)) as f:
            return f.read()

    def rss(self):
        for line in open(f"/proc/{self.child.pid}/status"):
            if line.startswith("VmRSS"):
                return int(line.split()[1]) * 1024

    def job(self, job, disks, size="1M"):
        os.path.isdir(self.path(f"jobs/{job}")) or os.mkdir(self.path(f"jobs/{job}"))
        for disk in disks:
            self.write(f"jobs/{job}/control", f"create {disk} {size}")


def median_ms(work, n):
    times = []
    for _ in range(n):
        began = time.perf_counter()
        work()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def requests(top):
    """FUSE requests a command costs, counted by the daemon's own trace of them."""
    tree = Tree(os.path.join(top, "requests"), log="warn,fuser=debug")
    try:
        tree.job("a", ["d"])
        count = lambda: open(tree.log, errors="replace").read().count("FUSE(")
        volume = "jobs/a/disks/d"
        for what, command in [("cat status", f"cat {volume}/status"), ("stat status", f"stat {volume}/status"),
                              ("ls -l of a volume (17 names)", f"ls -l {volume}/"), ("find jobs", "find jobs"),
                              ("dash: read x < status", f"dash -c 'read x < {volume}/status'"),
                              ("echo reconcile > control", f"echo reconcile > {volume}/control")]:
            os.listdir(tree.mnt)
            time.sleep(0.05)
            before = count()
            subprocess.run(["sh", "-c", command], cwd=tree.mnt, stdout=subprocess.DEVNULL, check=True)
            time.sleep(0.05)
            say(f"requests: {what}", count() - before, "", note="uncached on purpose")
    finally:
        tree.stop()


def attach(top):
    tree = Tree(os.path.join(top, "attach"))
    try:
        tree.job("a", ["d"], "8M")
        sh = lambda script: subprocess.run(["dash", "-c", script], cwd=tree.mnt, check=True)
        times, floor, back = [], [], []
        for _ in range(60):
            floor.append(median_ms(lambda: sh(":"), 1))
            times.append(median_ms(lambda: sh("echo attach > jobs/a/disks/d/control"), 1))
            back.append(median_ms(lambda: sh("echo detach > jobs/a/disks/d/control"), 1))
        say("floor: dash that does nothing", statistics.median(floor), "ms")
        say("echo attach, whole process, journal included", statistics.median(times), "ms", "<= 10")
        say("echo detach, whole process", statistics.median(back), "ms")
        say("echo attach / floor", statistics.median(t / f for t, f in zip(times, floor)), "x")

        # A device that carries a volume's identity is bound behind the daemon's back: how soon is it seen?
        uuid = os.path.basename(os.readlink(tree.path("jobs/a/disks/d")))
        junk = os.path.join(tree.top, "junk")
        seen = []
        for _ in range(30):
            with open(junk, "wb") as f:
                f.truncate(8 << 20)
            status = open(tree.path("jobs/a/disks/d/status"))
            assert status.read() == "detached\n"
            poll = select.poll()
            poll.register(status, select.POLLPRI)
            while True:
                n = fcntl.ioctl(ctl := os.open("/dev/loop-control", os.O_RDWR), 0x4C82)
                os.close(ctl)
                loop, backing = os.open(f"/dev/loop{n}", os.O_RDWR), os.open(junk, os.O_RDWR)
                name = f"volfs:{uuid}".encode()
                info = struct.pack("QQQQQIIII64s64s32sQQ", 0, 0, 0, 0, 0, 0, 0, 0, 0, name, b"", b"", 0, 0)
                try:
                    fcntl.ioctl(loop, 0x4C0A, struct.pack("II", backing, 512) + info + bytes(64))
                    break
                except OSError:
                    os.close(loop), os.close(backing)
            began = time.perf_counter()
            assert poll.poll(5000), "not seen in 5 s"
            seen.append((time.perf_counter() - began) * 1e3)
            status.seek(0)
            word = status.read()
            assert word == "conflict\n", word
            poll.register(status, select.POLLPRI)
            fcntl.ioctl(loop, 0x4C01, 0)
            os.close(loop), os.close(backing)
            while True:
                status.seek(0)
                if status.read() == "detached\n":
                    break
                poll.poll(100)
            status.close()
        say("device seen after the ioctl (poll on status wakes)", statistics.median(seen), "ms", "<= 5")
    finally:
        tree.stop()


def parked(top):
    gate = os.path.join(top, "gate")
    open(gate, "w").close()
    tree = Tree(os.path.join(top, "parked"), {"VOLFS_FAILPOINTS": f"attach.before-call=wait:{gate}"})
    try:
        tree.job("a", ["d", "e"], "8M")
        reader = lambda: tree.read("jobs/a/disks/e/status")
        for _ in range(200):
            reader()
        for count, goal in ((500, "<= 1.2"), (2000, None)):
            idle, busy, each = [], [], []
            for _ in range(5):
                idle.append(median_ms(reader, 300))
                before = tree.rss()
                pids = []
                # One small C-like process each: what waits is a process in write(2), as a shell is.
                for _ in range(count // 5):
                    pids.append(subprocess.Popen(["dash", "-c", "echo attach > jobs/a/disks/d/control"], cwd=tree.mnt))
                waiting = lambda: int(re.search(r'"callers":(\d+)', info()).group(1)) if info() else 0
                info = lambda: next((t for t in (tree.read(f"operations/{n}") for n in os.listdir(tree.path("operations"))) if '"attach"' in t and '"ended":null' in t), "")
                deadline = time.monotonic() + 60
                while waiting() < len(pids) and time.monotonic() < deadline:
                    time.sleep(0.05)
                threads = [threading.Thread(target=tree.write, args=("jobs/a/disks/d/control", "attach")) for _ in range(count - len(pids))]
                for t in threads:
                    t.start()
                while waiting() < count and time.monotonic() < deadline:
                    time.sleep(0.05)
                assert waiting() == count, (waiting(), count)
                each.append((tree.rss() - before) / count)
                # Settled: the measure is of waiting, not of arriving.
                time.sleep(0.5)
                busy.append(median_ms(reader, 300))
                os.unlink(gate)
                for t in threads:
                    t.join()
                assert all(p.wait() == 0 for p in pids)
                open(gate, "w").close()
                tree.write("jobs/a/disks/d/control", "detach")
                if count > 500:
                    break
            say(f"reader's median, {count} parked / idle", statistics.median(b / i for b, i in zip(busy, idle)), "x", goal,
                f"idle {statistics.median(idle) * 1e3:.0f} us")
            say(f"memory a parked command, of {count}", max(each), "bytes", "<= 4096", "growth of VmRSS, first round the largest")
    finally:
        if os.path.exists(gate):
            os.unlink(gate)
        tree.stop()


def many(top, volumes):
    small = max(volumes // 10, 1)
    tree = Tree(os.path.join(top, "many"))
    try:
        base = tree.rss()
        listing, rss, first = {}, {}, {}
        made = 0
        for count in (small, volumes):
            lock, left = threading.Lock(), list(range(made, count))

            def work():
                while True:
                    with lock:
                        if not left:
                            return
                        n = left.pop()
                    tree.write("jobs/a/control", f"create d{n} 1M")

            if made == 0:
                os.mkdir(tree.path("jobs/a"))
            began = time.monotonic()
            threads = [threading.Thread(target=work) for _ in range(16)]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
            if count == volumes:
                say(f"create, 16 at once, up to {volumes} volumes", (count - made) / (time.monotonic() - began), "a second")
            made = count
            tree.stop()
            started = tree.start()
            word = tree.read("jobs/a/disks/d0/status")
            assert word == "detached\n", word
            first[count] = started
            rss[count] = tree.rss()
            for what in ("jobs/a/volumes", "volumes", "jobs/a/disks"):
                listing[what, count] = median_ms(lambda: os.listdir(tree.path(what)), 5)
        say(f"start to first correct read, {volumes} volumes", first[volumes], "s", "<= 1")
        say("memory a volume after a start", (rss[volumes] - rss[small]) / (volumes - small), "bytes", "<= 2048")
        for what in ("jobs/a/volumes", "volumes", "jobs/a/disks"):
            ratio = listing[what, volumes] / listing[what, small]
            say(f"ls {what}: {volumes} / {small} volumes", ratio, "x", "<= 11", f"{listing[what, volumes]:.1f} ms")
    finally:
        tree.stop()


def main():
    global BIN
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--volumes", type=int, default=10000)
    args.add_argument("--json")
    args.add_argument("--bin", help="measure this binary instead of building one")
    args.add_argument("--only", choices=["requests", "attach", "parked", "many"])
    args = args.parse_args()
    if args.bin:
        BIN = os.path.abspath(args.bin)
    else:
        subprocess.run(["cargo", "build", "-q", "--release", "--features", "failpoints"], cwd=TOP, check=True)
    top = tempfile.mkdtemp(prefix="volfs-bench-")
    print(f"kernel {os.uname().release}, {os.cpu_count()} cpus")
    try:
        for name, part in (("requests", requests), ("attach", attach), ("parked", parked)):
            if args.only in (None, name):
                part(top)
        if args.only in (None, "many"):
            many(top, args.volumes)
    finally:
        for line in open("/proc/self/mountinfo").read().splitlines():
            at = line.split()[4]
            if at.startswith(top):
                subprocess.run(["umount", "-l", at])
        shutil.rmtree(top, ignore_errors=True)
    if args.json:
        with open(args.json, "w") as f:
            json.dump(rows, f, indent=1)
    missed = [r for r in rows if r["goal"] and r["value"] > float(r["goal"].split()[1])]
    for r in missed:
        print(f"missed: {r['what']}: {r['value']:.4g} {r['unit']}, goal {r['goal']}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
