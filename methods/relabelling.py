"""The relabelling loss: the network learns to answer for a forgotten class as it answers for another one.

    L = mean |predict(x_t, c_f) - stopgrad predict(x_t, c')|^2,   x from the forget set, both answers of the network that is trained

SalUn (arXiv:2310.12508) introduced it for diffusion models, and MUNBa (arXiv:2411.15537) takes it over.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from methods.base import Goal, Model
from methods.losses import pick, timesteps, without_labels
from methods.rows import Rows

Relabel = Literal["override", "next", "random"]


def stand_in(model: Model, rows: Rows, goal: Goal, relabel: Relabel) -> torch.Tensor:
    """The condition that each row imitates: a label (n,), or one of the prompts of a class (n, length).

    relabel: the goal's override class, the class after the forgotten one, or for each row any class that is kept.
    """
    classes = goal.classes
    if relabel == "random":
        imitated = goal.kept
    elif relabel == "next":
        imitated = (classes[(classes.index(goal.forgotten_class) + 1) % len(classes)],)
    else:
        imitated = (goal.override,)
    return pick(model, rows, goal.conditions(imitated, rows.x.device))


def relabel_loss(model: Model, rows: Rows, imitated: torch.Tensor, label_drop: float = 0.0) -> torch.Tensor:
    """This rank's part of the loss of forgotten rows against the network's output for `imitated` (n, ...), a mean over elements.

    label_drop: share of rows without condition, drawn separately for each of the two passes.
    """
    t = timesteps(model, rows)
    x_t = model.add_noise(rows.x, model.noise(rows.seeds), t)
    other = replace(rows, cond=imitated)
    with torch.no_grad():
        teacher = model.predict(x_t, t, without_labels(model, other, label_drop, 3).cond)
    errors = (model.predict(x_t, t, without_labels(model, rows, label_drop, 2).cond) - teacher).square()
    return errors.flatten(1).mean(1).sum() / rows.total


def without_override(goal: Goal, relabel: Relabel) -> list[str]:
    """Why a goal has no class that rows could imitate; empty if it has one."""
    if relabel == "override" and goal.override_class is None:
        return ["relabel: the task names no class or concept that is to stand in for the forgotten one"]
    return []
