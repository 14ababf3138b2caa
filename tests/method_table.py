"""Every method on tiny real models: settings, construction, and its first steps."""

from __future__ import annotations

import torch
from tiny import (
    TinyText,
    batch_for,
    concept_task,
    tiny_model,
    tiny_task,
)

from methods.base import Method
from raysweep.registry import METHODS, resolve, unserved

D = torch.float64
SETTINGS: dict[str, dict] = {
    "advunlearn": {
        "sampler_steps": 3,
        "plain_steps": 1,
        "attack_steps": 2,
        "attack_lr": 0.1,
        "attack_from": "latest",
        "retain_batch_size": 6,
    },
    "bernoulli": {"rho": 0.5},
    "concept_ablation": {"lam": 0.2, "images": 6, "sampler_steps": 3, "guidance": 1.5},
    "conceptprune": {"ratio": 0.1, "timesteps": 2, "sampler_steps": 3, "guidance": 2.0},
    "erasediff": {"inner_steps": 2, "inner_every": 2, "ema": 0.5, "label_drop": 0.3},
    "esd": {"sampler_steps": 4},
    "rece": {"epochs": 2, "preserved": "both"},
    "rg": {"retain_pass": "full"},
    "rgd": {"trunc_elem_sq": None},
    "retrain": {"split": "retain", "warmup": 2},
    "salun": {"alpha": 1.0, "label_drop": 0.3},
    "selective_amnesia": {
        "replay_per_class": 4,
        "fisher_per_class": 2,
        "fisher_timesteps": 4,
        "sampler_steps": 3,
        "ema": 0.0,
    },
    "sfd": {"lr_fake": 1e-3, "ema": 0.5, "forget": 0.5, "fake_forget": 0.5},
    "sfd_two_stage": {"lr_fake": 1e-3, "stage1_steps": 2, "stage1_batch_size": 8, "ema": 0.5},
    "siss": {"rho": 0.5},
    "siss_no_is": {"rho": 0.5},
    "slug": {"bisection": 3, "passes": 1},
    "speed": {"threshold": 0.5, "guide": "override"},
    "ssd": {"alpha": 1.0, "passes": 1},
    "uce": {"preserved": "both"},
}
ALL = sorted(METHODS)
TRAINED = [name for name in ALL if name != "sld"]  # SLD is a sampler: it has no steps and changes no weight
PIXEL = [name for name in ALL if not unserved(resolve("method", name), "pixel-ddpm")]
EDITS = ("conceptprune", "slug", "ssd", "uce", "rece", "speed")  # set weights from tensors prepared beforehand
STEPPED = [name for name in TRAINED if name not in EDITS]


def task_for(name: str):
    if name not in PIXEL:
        return concept_task()
    return tiny_task("points" if "points" in resolve("method", name).kinds else "class")


def model_for(name: str, task, seed: int = 0, dtype=D):
    return tiny_model(task, seed, dtype) if name in PIXEL else TinyText.tiny(seed, dtype)


def settings_for(name: str, **more) -> dict:
    common = {"lr": 1e-3, "steps": 3, "batch_size": 12}
    fields = resolve("method", name).Hyperparameters.model_fields
    return {k: v for k, v in common.items() if k in fields} | SETTINGS.get(name, {}) | more


def build(name: str, task=None, dtype=D, seed: int = 0, model=None, **settings) -> tuple[Method, object]:
    task = task or task_for(name)
    cls = resolve("method", name)
    hp = cls.Hyperparameters(**settings_for(name, **settings))
    model = model or model_for(name, task, seed, dtype)
    prepared = cls.prepare(model, task, 0, hp)
    return cls(model, hp, prepared, task.goal), task


def weights(method: Method) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in method.model.net.parameters()])


def run(method: Method, task, start: int = 0, stop: int = 3) -> torch.Tensor:
    for step in range(start, min(stop, method.steps)):
        method.step(batch_for(method, task, step))
    return weights(method)


def slow(name: str) -> dict:
    """A small learning rate: Adam blows rounding up at large ones."""
    return {"lr": 1e-4} if "lr" in resolve("method", name).Hyperparameters.model_fields else {}
