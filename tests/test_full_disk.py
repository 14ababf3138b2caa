"""Storage that fills midway, on a real file system of 16 MB: one message, nothing lost, and the run goes on.

The file system is mounted in a namespace of its own, where the system allows that.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
from tiny import ROOT

MOUNT = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
SMALL = 'mount -t tmpfs -o size=16m none "$0" && exec "$@"'
START = """
import sys
from pathlib import Path
root, *paths = map(Path, sys.argv[1:])
sys.path[:0] = map(str, paths)
def fill():
    with open(root / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
def free():
    (root / "filler").unlink()
"""


def on_a_small_disk(folder, script: str) -> str:
    """The output of a script with `root`, the folder of a small file system, and `fill` and `free`."""
    command = [sys.executable, "-c", START + script, str(folder), str(ROOT), str(ROOT / "tests")]
    if subprocess.run([*MOUNT, SMALL, str(folder), "true"], capture_output=True).returncode:
        pytest.skip("this system allows no mounts in namespaces")
    process = subprocess.run([*MOUNT, SMALL, str(folder), *command], capture_output=True, text=True, timeout=250)
    assert process.returncode == 0, process.stderr
    return process.stdout


ATTEMPT = """
from finished import front, row, run, trial
from raysweep.engine.attempt import attempt
from raysweep.engine.cluster import RunFailed
from raysweep.report.page import build
from raysweep.results.trials import read_trials, save_trials
from raysweep.rundir import RunDir
from raysweep.search.outcome import FINAL
from raysweep.search.searcher import ParetoSearch
from raysweep.search.spaces import Parameter, Space
from tiny import tiny_task

home = run(root / "full", front([row("000-rgd", 0.05, 0.2)]))
sweep, task = home.sweep(), tiny_task("points")
home.update(digests={"config": sweep.digest, "task": task.digest})
spaces = [Space("rgd", {}, (Parameter("lr", "log", (1e-5, 1e-3), {}),), ())]
def search():
    return ParetoSearch(home.journal, home.run_id, spaces, 40, 1, 0, sampler="random")
def end(searcher, name):
    config = searcher.suggest(name)
    result = {"residue": 0.1, "damage": 0.2, "digest": "d", "probe": "p", FINAL: True}
    searcher.on_trial_complete(name, result)
    return config["trial"]

first = search()
names = [end(first, str(k)) for k in range(5)]
before, page = home.read_manifest(), build(home).read_bytes()
for work in (lambda: [end(search(), str(k)) for k in range(5, 40)], lambda: build(home), lambda: save_trials(home, [trial("000-rgd", reason="x" * 100000)], 0)):
    try:
        with attempt(home, sweep, task, lambda: print("reported")):
            fill()
            work()
    except RunFailed as error:
        print("failed:", error)
    assert home.report.read_bytes() == page
    assert [t.trial for t in read_trials(home)] == ["000-rgd"]
    free()
    assert not list(home.path.glob(".*.tmp"))
    assert home.read_manifest()["state"] in ("running", "failed")
again = search()
from raysweep.results.trials import trial_table
kept = [t.trial for t in trial_table(home, home.run_id)]
assert kept[:5] == names, (kept, names)
end(again, "more")
with attempt(home, sweep, task):
    build(home)
print("resumed")
"""


def test_a_run_whose_disk_fills_says_so_once_loses_nothing_and_goes_on(tmp_path):
    lines = on_a_small_disk(tmp_path, ATTEMPT).splitlines()
    assert lines[-1] == "resumed"
    assert len(lines) == 4
    for line in lines[:3]:
        assert line.startswith("failed: ")
        assert "No space left on device; free some space there, and run the same command again to resume" in line
