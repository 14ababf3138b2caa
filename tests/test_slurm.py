"""docs/cluster/slurm.sh: what it starts where and how it ends, with stand-ins; slow: two Ray nodes and a sweep on this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from small import SMALL
from tiny import ROOT

from raysweep.storage.schemas import TRIALS, read_table

pytestmark = pytest.mark.timeout(900)

SCRIPT = ROOT / "docs" / "cluster" / "slurm.sh"
# starts the command once for each node, all on this machine, and ends with them
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
trap 'kill $(jobs -p)' TERM
for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" & done
wait
wait
"""
# Ray's nodes on one machine need ports of their own
RAY = """#!/bin/bash
if [ "$1" = start ]; then set -- "$@" --dashboard-agent-listen-port=$((HEAD_PORT + 1 + SLURM_NODEID)); fi
exec {ray} "$@"
"""
# a node of Ray that notes how it was started, and runs until it is ended; the head listens
NODE = """#!/bin/bash
echo "$SLURM_NODEID $*" >> {folder}/nodes
if [[ $* == *--head* ]]; then
  exec {python} -c "
import socket, time
listening = socket.create_server(('127.0.0.1', $HEAD_PORT))
time.sleep(60)"
fi
exec sleep 60
"""
# the commands of the script that need Ray, and a sweep that ends on SIGTERM with 130, else after a while
PYTHON = """#!/bin/bash
case "$*" in
  *get_node_ip_address*) echo 127.0.0.1 ;;
  *ray.nodes*) echo {joined} ;;
  *raysweep*) echo "$* at $RAY_ADDRESS" >> {folder}/sweep; trap 'exit 130' TERM; for i in $(seq {ticks}); do sleep 0.1; done ;;
  *) exec {python} "$@" ;;
esac
"""


def is_free(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) != 0


@pytest.fixture
def job(tmp_path, cache):
    """Starts the script as a job, in a folder with these commands besides srun and scontrol; (its process, its output file)."""
    tools, python = tmp_path / "bin", Path(sys.executable).parent
    tools.mkdir()
    number = next(n for n in range(os.getpid() % 10_000, 12_000) if is_free(20_000 + n))
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "COV_"))}
    environment = clean | {
        "PATH": f"{tools}:{python}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_ID": str(number),
        "SLURM_CPUS_ON_NODE": "1",
        "RAYSWEEP_CACHE": str(cache),
        "RAY_worker_niceness": "0",
    }
    started = []

    def start(commands: dict[str, str], nodes: int, *arguments: str) -> tuple[subprocess.Popen[bytes], Path]:
        commands = {"srun": SRUN, "scontrol": f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol\n'} | commands
        for name, body in commands.items():
            (tools / name).write_text(body)
            (tools / name).chmod(0o755)
        output = tmp_path / f"job-{len(started)}.log"
        with open(output, "w") as file:
            process = subprocess.Popen(
                ["bash", SCRIPT, *arguments],
                cwd=tmp_path,
                env=environment | {"SLURM_NNODES": str(nodes)},
                stdout=file,
                stderr=file,
            )
        started.append(process)
        return process, output

    yield start
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()
    shutil.rmtree(f"/tmp/ray-{number}", ignore_errors=True)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], output: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, output.read_text()
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.1)


def stand_ins(folder: Path, joined: int, ticks: int) -> dict[str, str]:
    return {
        "ray": NODE.format(folder=folder, python=sys.executable),
        "python": PYTHON.format(folder=folder, python=sys.executable, joined=joined, ticks=ticks),
    }


@pytest.mark.parametrize(
    ("nodes", "roles"), [(1, [""]), (2, ["audit", "train"]), (5, ["audit", "audit", "train", "train", "train"])]
)
def test_a_quarter_of_the_nodes_audits(job, tmp_path, nodes, roles):
    process, output = job(stand_ins(tmp_path, nodes, 15), nodes, "my.yaml", "name=x y")
    assert process.wait(timeout=60) == 0, output.read_text()
    starts = sorted((tmp_path / "nodes").read_text().splitlines())
    assert len(starts) == nodes
    for number, (start, role) in enumerate(zip(starts, roles, strict=True)):
        assert start.startswith(f"{number} start {'--head' if number == 0 else '--address=127.0.0.1:'}")
        assert ("--labels" in start) == bool(role)
        assert not role or f"--labels=role={role}" in start.split()
        assert '--resources={"trial_slot": 64}' in start
    (sweep,) = (tmp_path / "sweep").read_text().splitlines()
    assert sweep.startswith("-m raysweep run my.yaml name=x y at 127.0.0.1:")
    assert not (tmp_path / "scontrol").exists()
    assert not list(tmp_path.glob(".raysweep-token-*"))


@pytest.mark.parametrize(("sent", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_only_the_time_limit_queues_the_job_again(job, tmp_path, sent, requeued):
    process, output = job(stand_ins(tmp_path, 2, 600), 2, "my.yaml")
    wait_for((tmp_path / "sweep").exists, process, output, 60)
    (token,) = tmp_path.glob(".raysweep-token-*")
    assert token.stat().st_mode & 0o77 == 0
    process.send_signal(sent)
    assert process.wait(timeout=60) == 130, output.read_text()
    assert (tmp_path / "scontrol").exists() == requeued
    assert not token.exists()


def test_nodes_that_do_not_start_end_the_job(job, tmp_path):
    commands = stand_ins(tmp_path, 0, 1) | {"ray": "#!/bin/sh\necho no room; exit 1\n"}
    process, output = job(commands, 1, "my.yaml")
    assert process.wait(timeout=60) == 1
    assert "raysweep - 0 of 1 nodes have joined the Ray cluster; see the output above" in output.read_text()
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_a_sweep_is_interrupted_before_its_limit_and_resumed(job, tmp_path):
    """With real Ray nodes, one that audits and one that trains."""
    (tmp_path / "small.yaml").write_text(SMALL)
    commands = {"ray": RAY.format(ray=Path(sys.executable).parent / "ray")}
    settings = ("small.yaml", f"storage={tmp_path}", "search.trials=8", "audit.rounds=1", "audit.finalists=0")
    process, output = job(commands, 2, *settings)
    folder = tmp_path / "small"
    wait_for((folder / "study.journal").is_file, process, output, 400)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=180) == 130, output.read_text()
    assert "Interrupted" in output.read_text()
    assert (tmp_path / "scontrol").read_text().startswith("requeue ")
    resumed, output = job(commands, 2, *settings)
    assert resumed.wait(timeout=500) == 0, output.read_text()
    trials = read_table(folder / "trials.parquet", TRIALS).to_pylist()
    assert [t["state"] for t in trials] == ["COMPLETE"] * 8
