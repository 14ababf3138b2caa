"""`ray job submit` on a local head with a token: a stopped job resumes when submitted again, a wrong config fails."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import ray
from small import SMALL
from tiny import ROOT

from raysweep.storage.schemas import TRIALS, read_table

pytestmark = pytest.mark.timeout(900)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """(environment, address of the jobs API, address of the cluster) of a Ray head on loopback that asks for a token."""
    folder = tmp_path_factory.mktemp("head")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "COV_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = clean | {"PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    env["RAY_worker_niceness"] = "0"  # as in conftest
    gcs, jobs, agent = free_port(), free_port(), free_port()
    command = [
        *("ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"),
        *("--num-cpus=2", "--object-store-memory=200000000", '--resources={"trial_slot": 100}'),
        *(f"--port={gcs}", f"--dashboard-port={jobs}", f"--temp-dir=/tmp/rs{gcs}"),
        f"--dashboard-agent-listen-port={agent}",  # the default is taken if another Ray runs on this machine
    ]
    with open(folder / "head.log", "w") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    address = f"http://127.0.0.1:{jobs}"
    for _ in range(120):
        try:
            urllib.request.urlopen(f"{address}/api/jobs/", timeout=2)
            pytest.fail("the jobs API answers without a token")
        except urllib.error.HTTPError as refused:
            code = refused.code
            break
        except OSError:
            assert process.poll() is None, (folder / "head.log").read_text()
            time.sleep(0.5)
    else:
        code = 0
        pytest.fail((folder / "head.log").read_text())
    assert code == 401  # the API is up, and closed to requests without the token
    yield env, address, f"127.0.0.1:{gcs}"
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    _, alive = psutil.wait_procs(family, timeout=10)
    for p in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            p.kill()
    process.kill()
    process.wait(timeout=30)
    shutil.rmtree(f"/tmp/rs{gcs}", ignore_errors=True)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> Path:
    """A working directory for `ray job submit` with the packages and a config only."""
    folder = tmp_path_factory.mktemp("shipped")
    for name in ("raysweep", "methods", "evaluators", "search_spaces"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "small.yaml").write_text(SMALL)
    return folder


def ray_job(head, *arguments: str, check: bool = True) -> str:
    env, address, _ = head
    for _ in range(30):
        process = subprocess.run(
            ["ray", "job", arguments[0], "--address", address, *arguments[1:]],
            env=env,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        output = process.stdout + process.stderr
        if "No available agent" not in output:  # the head's agent starts after its jobs API
            break
        time.sleep(1)
    assert not check or process.returncode == 0, output
    return output


def submit(head, shipped: Path, name: str, storage: Path, cache: Path, *flags: str) -> str:
    variables = {"RAYSWEEP_CACHE": str(cache), "RAY_JOB_STOP_WAIT_TIME_S": "60", "PYTHONUNBUFFERED": "1"}
    environment = ("--runtime-env-json", json.dumps({"env_vars": variables}))
    settings = (f"storage={storage}", "search.trials=4", "audit.rounds=1", "audit.finalists=0")
    return ray_job(
        head,
        *("submit", "--submission-id", name, "--working-dir", str(shipped), *flags, *environment),
        *("--", "python", "-m", "raysweep", "run", "small.yaml", *settings),
    )


def test_a_job_is_stopped_resumed_and_finished(head, shipped, cache, tmp_path_factory):
    storage = tmp_path_factory.mktemp("storage")
    submit(head, shipped, "first", storage, cache, "--no-wait")
    deadline = time.monotonic() + 300
    candidates = storage / "small" / "candidates"
    while not list(candidates.glob("*/raysweep.json")):
        assert time.monotonic() < deadline, ray_job(head, "logs", "first", check=False)
        time.sleep(0.2)
    ray_job(head, "stop", "first")
    assert "was stopped" in ray_job(head, "status", "first", check=False)
    manifest = storage / "small" / "manifest.json"
    assert json.loads(manifest.read_text())["state"] == "interrupted"
    cards = {p: p.stat().st_mtime_ns for p in candidates.glob("*/raysweep.json")}
    assert cards

    followed = submit(head, shipped, "second", storage, cache)  # follows the log to the end
    assert "resuming" in followed
    assert "ecommended" in followed
    assert "succeeded" in followed
    assert json.loads(manifest.read_text())["state"] == "done"
    trials = read_table(storage / "small" / "trials.parquet", TRIALS).to_pylist()
    assert [t["state"] for t in trials] == ["COMPLETE"] * 4
    assert {p: p.stat().st_mtime_ns for p in cards} == cards
    assert (storage / "small" / "report.html").is_file()


def test_a_cluster_of_another_version_is_refused_in_one_sentence(head, tmp_path):
    env, _, cluster = head
    code = "import ray; ray.__version__ = '2.0.0'; from raysweep.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "run", f"storage={tmp_path}"],
        env=env | {"RAY_ADDRESS": cluster, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert f"RAY_ADDRESS={cluster}: this cluster has another Ray or Python than this process" in line
    assert f"Ray: {ray.__version__}" in line
    assert "Ray: 2.0.0" in line
    assert "Traceback" not in done.stderr


def test_a_wrong_config_fails_the_job_with_its_message(head, shipped, tmp_path):
    (shipped / "bad.yaml").write_text("methods: [sis]\n")
    output = ray_job(
        head,
        *("submit", "--submission-id", "bad", "--working-dir", str(shipped)),
        *("--", "python", "-m", "raysweep", "run", "bad.yaml", f"storage={tmp_path}"),
        check=False,
    )
    assert "did you mean 'siss'" in output
    assert "Traceback" not in output.split("error:")[0]
    assert "failed" in ray_job(head, "status", "bad", check=False)
    assert os.listdir(tmp_path) == []
