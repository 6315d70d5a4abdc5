#!/usr/bin/env python3
"""How long a reader waits when the daemon is killed below its keeper.

    benches/restart.py [--volumes N] [--kills N]

As root, in the checkout, after `cargo build --release`. Reads one file over and over, kills the
daemon at random moments, and prints the longest gap between two answers for each kill beside the
median gap of the same run.
"""
import argparse, os, random, signal, statistics, subprocess, tempfile, threading, time

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BIN = os.path.join(TOP, "target", "release", "volfs")

a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
a.add_argument("--volumes", type=int, default=100)
a.add_argument("--kills", type=int, default=20)
a = a.parse_args()

with tempfile.TemporaryDirectory() as top:
    mnt = os.path.join(top, "mnt")
    os.mkdir(mnt)
    keeper = subprocess.Popen(
        [BIN, "--state-dir", os.path.join(top, "state"), "--config", "/dev/null", "--log", "error", "mount", mnt, "--background-child"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        assert keeper.stdout.readline().strip() == b"ready"
        os.mkdir(f"{mnt}/jobs/a")
        for n in range(a.volumes):
            with open(f"{mnt}/jobs/a/control", "wb", buffering=0) as f:
                f.write(b"create d%d 1M" % n)
        with open(f"{mnt}/jobs/a/disks/d0/control", "wb", buffering=0) as f:
            f.write(b"attach")
        answers, stop = [], threading.Event()

        def read():
            want = open(f"{mnt}/jobs/a/disks/d0/device").read()
            while not stop.is_set():
                with open(f"{mnt}/jobs/a/disks/d0/device") as f:
                    assert f.read() == want
                answers.append(time.monotonic())

        reader = threading.Thread(target=read)
        reader.start()
        kills = []
        for _ in range(a.kills):
            time.sleep(1.1 + random.random() / 5)
            children = open(f"/proc/{keeper.pid}/task/{keeper.pid}/children").read().split()
            kills.append(time.monotonic())
            os.kill(int(children[0]), signal.SIGKILL)
        time.sleep(1.1)
        stop.set()
        reader.join()
        with open(f"{mnt}/jobs/a/disks/d0/control", "wb", buffering=0) as f:
            f.write(b"detach")
        gaps = [b - x for x, b in zip(answers, answers[1:])]
        pauses = [max(b - x for x, b in zip(answers, answers[1:]) if b > k and x < k + 1) for k in kills]
        print(f"{a.volumes} volumes, {a.kills} kills: pause {statistics.median(pauses) * 1e3:.0f} ms median, "
              f"{max(pauses) * 1e3:.0f} ms worst; between two answers otherwise {statistics.median(gaps) * 1e6:.0f} us")
        raise SystemExit(0 if max(pauses) < 0.3 else 1)
    finally:
        keeper.send_signal(signal.SIGTERM)
        keeper.wait()
