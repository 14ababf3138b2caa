"""The audit card of a tiny model, written as `raysweep audit` writes it, without Ray."""

from __future__ import annotations

from pathlib import Path

from tiny import tiny_model, tiny_task

import raysweep
from evaluators.judge import train_judge
from raysweep.auditing.anchors import Anchors, assess_views
from raysweep.auditing.auditor import Auditor
from raysweep.auditing.card import ModelFolder
from raysweep.config.schema import Tier
from raysweep.context import Context, load_measured
from raysweep.models.contents import not_read
from raysweep.models.identity import Identity
from raysweep.results.cards import conclude
from raysweep.storage.cache import save_tensors
from raysweep.storage.files import digest_state

SIZES = {
    "groups": 4,
    "samples": 20,
    "class_samples": 20,
    "noises": 8,
    "loss_noises": 6,
    "loss_images": 4,
    "timesteps": 3,
}
MEMBERSHIP = {"membership_images": 8, "membership_noises": 1, "membership_t": (50,), "strips": 2}
CHECKS = ("denoising", "reconstruction", "fidelity", "classifier", "loss", "per_class")
TIERS = {
    "audit": Tier(seed=2, judge="audit", checks=CHECKS, **SIZES, **MEMBERSHIP),
    "durability": Tier(seed=3, judge="audit", checks=("weight_noise",), **SIZES),
}


def write_card(root: Path) -> Path:
    """The folder of a card below `root`. The base is trained a little, so that it knows more than the untrained oracles."""
    task = tiny_task()
    context = Context(
        run=str(root / "run"),
        run_id="",
        task_digest=task.digest,
        quality=task.quality,
        validity=task.validity,
        base=str(root / "base"),
        base_digest="",
        oracles={},
        judges={},
        prepared={},
        cache=str(root / "cache"),
        views=task.views,
    )
    context.folder.task.mkdir(parents=True)
    task.save(context.folder.task)
    models = {
        "base": raysweep.unlearn(tiny_model(task), task, "retrain", split="forget", steps=150, lr=3e-3, batch_size=16)
    }
    models |= {"oracle-0": tiny_model(task, 1), "oracle-1": tiny_model(task, 2)}
    models |= {
        "mine": raysweep.unlearn(tiny_model(task, 3), task, "retrain", split="train", steps=20, lr=3e-3, batch_size=16)
    }
    folders = {}
    for name, model in models.items():
        model.save(root / name)
        found = Identity.read(str(root / name))
        folders[name] = ModelFolder(found.folder, found.digest, found.networks, not_read(root / name))
    split = task.splits["judge_audit"]
    judge = train_judge(split.x, split.groups, 0, 20).state_dict()
    save_tensors(root / "judge.safetensors", judge)
    oracles = {name: (f.folder, f.digest) for name, f in folders.items() if name.startswith("oracle")}
    changes = {"base_digest": folders["base"].digest, "oracles": oracles}
    changes["judges"] = {"audit": (str(root / "judge.safetensors"), digest_state(judge))}
    context = Context(**vars(context) | changes)
    subject, mine = f"mine@{folders['mine'].digest[:8]}", folders["mine"]
    requests = {t: context.request(t, tier, subject, "", mine.folder, mine.digest) for t, tier in TIERS.items()}
    anchors = context.anchor_requests("audit", TIERS["audit"])
    worker = Auditor.__ray_metadata__.modified_class()
    for request in (*requests.values(), *anchors.values()):
        assert worker.measure(request)["failed"] == []
    measured = {name: load_measured(context.folder.path, request.key) for name, request in anchors.items()}
    scales = Anchors(measured["base"], (measured["oracle-0"], measured["oracle-1"]), measured["destroyed"])
    keys = {name: request.key for name, request in anchors.items()}
    context.save_anchors("audit", keys, assess_views(scales, task.views))
    named = {subject: mine} | {name: folders[name] for name in ("base", *oracles)}
    return conclude(task, context, requests, named, True, []).parent
