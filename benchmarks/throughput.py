"""Images per second of an audit against a plain pipeline loop, and how audits scale with auditors.

    python benchmarks/throughput.py            # prints one JSON object

The plain form is what a script would do: diffusers' `DDIMPipeline`, one image per call, its default batch of one, on the same
model, number of images and sampling steps. Both contenders take turns. The second part audits the same models with one and
with two audit actors on a local Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import ray
import torch
from diffusers import DDIMPipeline
from ground import Ground, machine

from raysweep.auditing.auditor import Auditor
from raysweep.auditing.manager import AuditManager
from raysweep.auditing.request import AuditRequest
from raysweep.engine.cluster import ENVIRONMENT
from raysweep.storage.cache import save_tensors
from raysweep.storage.files import write_folder
from raysweep.train.broker import NAMESPACE

IMAGES, REPEATS, MODELS = 100, 5, 8


def plain(model, steps: int) -> float:
    """Seconds per image of the loop."""
    pipeline = DDIMPipeline(model.net, model.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generator, started = torch.Generator().manual_seed(0), time.perf_counter()
    for _ in range(IMAGES // 5):
        pipeline(generator=generator, num_inference_steps=steps, output_type="np")
    return (time.perf_counter() - started) / (IMAGES // 5)


def audited(subject, repeat: int) -> float:
    """Seconds per image of the audit's own sampling."""
    started = time.perf_counter()
    subject.generate(None, torch.arange(IMAGES) + repeat)
    return (time.perf_counter() - started) / IMAGES


def scaling(g: Ground) -> dict[int, float]:
    """Seconds of the same probes by the number of auditors."""
    seconds = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_folder(folder / "task", g.task.save)
        save_tensors(folder / "judge.safetensors", g.judges["probe"].state_dict())
        root = str(Path(__file__).resolve().parent.parent)
        ray.init(
            address="local",
            num_cpus=2,
            log_to_driver=False,
            logging_level="ERROR",
            namespace=NAMESPACE,
            object_store_memory=200 * 2**20,
            runtime_env={"env_vars": ENVIRONMENT | {"PYTHONPATH": root}},
        )
        for count in (1, 2):
            names = [f"a{count}-{k}" for k in range(count)]
            auditors = [Auditor.options(num_cpus=1).remote() for _ in names]
            run = folder / f"run-{count}"
            run.mkdir()
            manager = AuditManager.remote(str(run), 1)
            for name, auditor in zip(names, auditors, strict=True):
                auditor.serve.remote(manager, name, 600.0)

            def request(subject: str, run=run) -> AuditRequest:
                return AuditRequest(
                    subject=subject,
                    method="",
                    model=g.folders["base"],
                    digest=subject,
                    tier_name="probe",
                    tier=g.tier("probe"),
                    judge=str(folder / "judge.safetensors"),
                    judge_digest="j",
                    task=str(folder / "task"),
                    task_digest="t",
                    run=str(run),
                )

            asked = [request(f"warm-{k}") for k in range(2 * count)]
            ray.get([manager.submit.remote(r.key, r) for r in asked])
            asked = [request(f"s{k}") for k in range(MODELS)]
            started = time.perf_counter()
            ray.get([manager.submit.remote(r.key, r) for r in asked])
            seconds[count] = time.perf_counter() - started
            for actor in (*auditors, manager):
                ray.kill(actor)
        ray.shutdown()
    return seconds


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    g = Ground("task=digits-picture", "oracles=1")
    subject = g.subject(g.model("base"), "probe")
    steps = g.task.sampling["steps"]
    loop, ours = [], []
    for repeat in range(REPEATS):
        loop.append(plain(subject.model, steps))
        ours.append(audited(subject, repeat))
    seconds = scaling(g)
    print(
        json.dumps(
            {
                "about": machine(),
                "sampling": {"images": IMAGES, "steps": steps, "repeats": REPEATS},
                "plain_images_per_s": {
                    "median": 1 / statistics.median(loop),
                    "min": 1 / max(loop),
                    "max": 1 / min(loop),
                },
                "audit_images_per_s": {
                    "median": 1 / statistics.median(ours),
                    "min": 1 / max(ours),
                    "max": 1 / min(ours),
                },
                "ratio": statistics.median(loop) / statistics.median(ours),
                "auditors": {"models": MODELS, "seconds": seconds, "speedup_1_to_2": seconds[1] / seconds[2]},
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
