"""Pairs of conditions that differ by what must be forgotten alone."""

from __future__ import annotations

import torch

from methods.base import Goal


def pairs(goal: Goal, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(c*, c): the conditions that ask for what must be forgotten, and those that ask for its stand-in; labels (1,) or tokens
    (k, length). The k-th prompt of one class is the k-th of the other, with another name."""
    return goal.conditions([goal.forgotten_class], device), goal.conditions([goal.override], device)


def unpaired(goal: Goal) -> list[str]:
    """Why a goal has no pairs; [] if it has."""
    if goal.override_class is None:
        return ["the task names no class or concept that is to stand in for the forgotten one"]
    forgotten, other = (len(c) for c in pairs(goal, torch.device("cpu")))
    if forgotten != other or not other:
        return [
            f"it pairs the prompts of the forgotten class with those of its stand-in, and there are {forgotten} and {other}"
        ]
    return []
