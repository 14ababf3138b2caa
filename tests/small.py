"""A sweep small enough for tests, the faulty methods that break it, and how to start it as a user would."""

from __future__ import annotations

import html
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from tiny import ROOT

SMALL = """
name: small
task: {name: digits-picture, base_steps: 70}
methods: [neggrad, siss_no_is]
spaces:
  neggrad: {steps: {logint: [2, 4]}}
  siss_no_is: {steps: {logint: [2, 5]}}
oracles: 2
search: {trials: 6, window: 4}
audit:
  top: 2
  rounds: 2
  probe: {samples: 40, class_samples: 20, noises: 12, loss_noises: 10, loss_images: 2, timesteps: 4, groups: 10}
  audit: {samples: 60, class_samples: 20, noises: 20, loss_noises: 20, loss_images: 2, timesteps: 4, membership_images: 30,
          membership_noises: 2, membership_t: [50, 200], recall_t: [100, 400], recall_noises: 3, recall_images: 6,
          relearn_steps: [2],
          checks: [altered, classifier, denoising, fidelity, generation, loss, recall, reconstruction, relearning, rmia]}
  finalists: 1
  durability: {checks: [relearning, quantisation], noises: 12, relearn_steps: [2]}
resources: {slots: 1, auditors: 1}
"""

FAULTY = '''
"""Methods that fail, each in a different way."""
import os, time
from pathlib import Path
import torch
from methods.finetune import Finetune

class Raises(Finetune):
    name = "raises"
    space = {"fixed": {"steps": 3}, "space": {"lr": {"log": [1e-4, 1e-3]}}}
    def direction(self, batch):
        raise RuntimeError("this method is broken")

class Nan(Raises):
    name = "nan"
    def direction(self, batch):
        return torch.full((sum(p.numel() for p in self.params),), float("nan")), {"loss": float("nan")}

class Hangs(Raises):
    name = "hangs"
    def direction(self, batch):
        time.sleep(3600)

class Slow(Finetune):
    name = "slow"
    space = {"fixed": {"steps": 6, "batch_size": 8}, "space": {"lr": {"log": [1e-4, 1e-3]}}}
    def direction(self, batch):
        with open(os.environ["FAULTY_MARK"], "a") as mark:
            mark.write("step\\n")
        time.sleep(2)
        return super().direction(batch)

class ExitsOnce(Finetune):
    name = "exitsonce"
    space = Raises.space
    def direction(self, batch):
        mark = Path(os.environ["FAULTY_MARK"])
        if not mark.exists():
            mark.touch()
            os._exit(9)
        return super().direction(batch)
'''


def install_faulty(folder: Path) -> str:
    """Writes the faulty methods as an installed package; returns the PYTHONPATH for it."""
    info = folder / "faulty-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1.0\n")
    names = {"raises": "Raises", "nan": "Nan", "hangs": "Hangs", "slow": "Slow", "exitsonce": "ExitsOnce"}
    lines = "".join(f"{name} = faulty_methods:{cls}\n" for name, cls in names.items())
    (info / "entry_points.txt").write_text("[raysweep.methods]\n" + lines)
    (folder / "faulty_methods.py").write_text(FAULTY)
    return os.pathsep.join([str(folder), str(ROOT)])


def environment(cache: Path, **more: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "COV_"))}
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    settings = {"PYTHONPATH": str(ROOT), "RAYSWEEP_CACHE": str(cache), "RAYSWEEP_DISPLAY": "plain"}
    return clean | path | {"RAY_worker_niceness": "0"} | settings | more  # priority: as in conftest


def start(folder: Path, cache: Path, *arguments: str, **env: str) -> subprocess.Popen:
    """`python -m raysweep ...` in `folder`, its output in folder/out.log."""
    out = open(folder / "out.log", "a")  # noqa: SIM115
    return subprocess.Popen(
        [sys.executable, "-m", "raysweep", *arguments],
        cwd=folder,
        stdout=out,
        stderr=subprocess.STDOUT,
        env=environment(cache, **env),
        start_new_session=True,
    )


def kill_after_two_trials(folder: Path, cache: Path, *arguments: str, **env: str) -> None:
    """Starts a sweep and kills it once two trials have ended; returns when Ray's processes, too, have ended."""
    process, deadline = start(folder, cache, *arguments, **env), time.monotonic() + 400
    while len(re.findall(r" trial  ", log(folder))) < 2:
        assert process.poll() is None, log(folder)
        assert time.monotonic() < deadline, log(folder)
        time.sleep(0.5)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(children, timeout=20)


def log(folder: Path) -> str:
    return (folder / "out.log").read_text()


def recipe_of(run: Path, folder: Path) -> Path:
    """The config that a run's report prints, saved as the report instructs."""
    page = (run / "report.html").read_text(encoding="utf-8")
    name = re.search(r"Save the config below as <code>(.+?)</code>", page)
    config = re.search(r"<summary>Config</summary><pre>(.+?)</pre>", page, re.DOTALL)
    assert name is not None
    assert config is not None
    path = folder / html.unescape(name[1])
    path.write_text(html.unescape(config[1]), encoding="utf-8")
    return path
