"""Near duplicates between the samples of a task: a picture on both sides of a comparison would blur it.

Real collections have them (photographs in a row, the same picture saved twice), so they are left out and counted, by name. Only
a held-out set of which many pictures were in training is refused: it is none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raysweep.tasks.records import MOST_BAD, NAMED, Account, ReasonCount, SourceError
from raysweep.tasks.sampling import Picked

if TYPE_CHECKING:
    Samples = dict[str, list[Picked]]

HELD = {"holdout": "held out", "of_kind": "of the forgotten class"}  # sample -> its name in an account


def separate(samples: Samples, accounts: list[Account], kind: str) -> None:
    """Moves or drops pictures until no two samples that are compared share near duplicates; the accounts say what was dropped.

    accounts: of the training and the held-out source. Of single pictures, duplicates in the retained sample are forgotten with them: they
    would keep the picture alive. Raises SourceError if too many held-out pictures were in training.
    """
    train, holdout = accounts
    if kind == "points":
        alike = _alike(samples["retain"], samples["forget"])
        samples["forget"] += [p for p, near in zip(samples["retain"], alike, strict=True) if near]
        samples["retain"] = [p for p, near in zip(samples["retain"], alike, strict=True) if not near]
    else:
        _drop(samples, "retain", samples["forget"], train, "to retain", "nearly a picture that must be forgotten")
    training = [*samples["retain"], *samples["forget"]]
    for name, title in HELD.items():
        count, pictures = len(samples[name]), samples[name]
        dropped = _drop(samples, name, training, holdout, title, "nearly a picture of the training set")
        if len(dropped) > MOST_BAD * count:
            names = ", ".join(p.key for p in pictures if p in dropped[:NAMED]) + (
                ", ..." if len(dropped) > NAMED else ""
            )
            raise SourceError(
                f"{holdout['source']}: {len(dropped)} of {count} pictures {title} are nearly pictures of {train['source']}: {names}; at most "
                f"{MOST_BAD:.0%} may be: leave these out (`exclude`), or name pictures that the model was not trained on"
            )


def apart(first: list[Picked], second: list[Picked], account: Account) -> list[Picked]:
    """The pictures of the second judge's half that are no near duplicates of one in the first's; the account says how many are."""
    samples = {"judge": second}
    _drop(samples, "judge", first, account, "", "left out of the audit's judge: nearly a picture of the search's judge")
    return samples["judge"]


def _drop(samples: Samples, name: str, others: list[Picked], account: Account, title: str, reason: str) -> list[Picked]:
    """Drops the pictures of a sample that are near duplicates of others, and returns them."""
    alike = _alike(samples[name], others)
    dropped = [p for p, near in zip(samples[name], alike, strict=True) if near]
    if dropped:
        samples[name] = [p for p, near in zip(samples[name], alike, strict=True) if not near]
        entry = ReasonCount(reason=reason, count=len(dropped), first=[p.key for p in dropped[:NAMED]])
        account["left_out" if title else "notes"].append(entry)
        if title:
            account["kept"][title] -= len(dropped)
    return dropped


def _alike(pictures: list[Picked], others: list[Picked]) -> list[bool]:
    """Whether each picture is a near duplicate of one of the others."""
    import torch

    from raysweep.tasks.task import NEAR, nearest

    if not pictures or not others:
        return [False] * len(pictures)
    near = nearest(torch.stack([p.x for p in pictures]), torch.stack([p.x for p in others])) < NEAR
    return list(near.tolist())
