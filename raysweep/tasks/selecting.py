"""Selects the records of a task's sources that must be forgotten, and draws the samples of images that a task uses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from raysweep.tasks.records import KNOWN, Account, Name, Record, SourceError, Tally, check_met, listed
from raysweep.tasks.sampling import Picked, Sample, pixels


class Selection(BaseModel):
    """Which records of the training source must be forgotten: all that match an entry of any list."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    labels: tuple[Name, ...] = Field((), description="records with these labels, spelled as in the source")
    captions: tuple[Name, ...] = Field(
        (), description="records whose captions contain these texts, in upper or lower case"
    )
    keys: tuple[Name, ...] = Field((), description="records with these names within the source")

    @model_validator(mode="after")
    def _is_not_empty(self) -> Self:
        if not (self.labels or self.captions or self.keys):
            raise ValueError("name what must be forgotten: labels, captions or keys")
        return self

    def holds(self, record: Any) -> bool:
        """Whether the record must be forgotten."""
        return record.label in self.labels or record.key in self.keys or bool(self.parts_of(record.caption))

    def parts_of(self, caption: str | None) -> list[str]:
        """The entries of `captions` that a caption contains."""
        return [part for part in self.captions if part.lower() in (caption or "").lower()]


@dataclass
class _Met:
    """The labels, keys and captions met in a pass: at most `KNOWN` of each, besides those that the selection names.

    parts: the entries of the selection's `captions` that were met.
    """

    selection: Selection
    labels: set[str] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)
    captions: set[str] = field(default_factory=set)
    parts: set[str] = field(default_factory=set)

    def add(self, record: Record) -> None:
        for names, name, wanted in (
            (self.labels, record.label, self.selection.labels),
            (self.keys, record.key, self.selection.keys),
            (self.captions, record.caption, ()),
        ):
            if name is not None and (len(names) < KNOWN or name in wanted):
                names.add(name)
        self.parts.update(self.selection.parts_of(record.caption))

    def check(self, source: Any, tally: Tally) -> None:
        """Raises SourceError if an entry of the selection matches no record, which would otherwise go unnoticed."""
        wanted = self.selection
        is_met = self.labels & set(wanted.labels) or self.keys & set(wanted.keys) or self.parts
        prefix = str(source) if is_met else f"{source}: nothing is left for the forget set"
        check_met(prefix, "forget.labels", wanted.labels, self.labels, tally)
        check_met(prefix, "forget.keys", wanted.keys, self.keys, tally)
        for part in wanted.captions:
            if part not in self.parts:
                shown = "; ".join(sorted(self.captions)[:3]) or "none, no record has one"
                raise SourceError(
                    f"{prefix}: forget.captions: no caption has {part!r}; captions are for example: {shown}"
                )


def draw_samples(
    config: Any, shape: tuple[int, int, int], required: tuple[str, ...]
) -> tuple[dict[str, list[Picked]], list[Account]]:
    """Reads both sources of an ImagesTask once; returns its samples of images, and an account of each source.

    The samples are `forget`, `retain` and `holdout`, and `of_kind`: held-out images of the forgotten class or concept.

    Args:
        config: an ImagesTask.
        shape: (channels, height, width) of the images.
        required: what a record must have, `label` or `caption`.

    Raises:
        SourceError: a needed sample is empty, or an entry of the selection matches no record.
    """
    forget, retain = Sample(config.forget_images, config.seed, repeats=True), Sample(config.retain_images, config.seed)
    held, of_kind = Sample(config.holdout_images, config.seed), Sample(config.holdout_images, config.seed)
    by_class = config.kind != "points"
    train, holdout = Tally(frozenset(config.forget.keys)), Tally()
    met = _sort(config.train, shape, train, required, config.forget, forget, retain)
    met.check(config.train, train)
    met = _sort(config.holdout, shape, holdout, required, config.forget, of_kind if by_class else held, held)
    drawn = {"forget": forget, "retain": retain, "holdout": held, "of_kind": of_kind}
    samples = {name: sample.images() for name, sample in drawn.items()}
    if by_class and not samples["of_kind"]:
        raise SourceError(
            f"{config.holdout}: holds no image of {config.forget.labels[0]!r}, the forgotten class; its labels are: "
            f"{listed(met.labels)}"
        )
    for name, source in (("retain", config.train), ("holdout", config.holdout)):
        if not samples[name]:
            raise SourceError(f"{source}: nothing is left for the {name} set: all of its records are to be forgotten")
    return samples, [
        _account("train", config.train, train, {"to forget": forget, "to retain": retain}),
        _account(
            "holdout",
            config.holdout,
            holdout,
            {"held out": held} | ({"of the forgotten class": of_kind} if by_class else {}),
        ),
    ]


def _sort(
    source: Any,
    shape: tuple[int, int, int],
    tally: Tally,
    required: tuple[str, ...],
    selection: Selection,
    chosen: Sample,
    others: Sample,
) -> _Met:
    """Reads a source and offers each image to the sample `chosen` if the selection holds it, else to `others`."""
    met = _Met(selection)
    for record, x in pixels(source, shape, tally, required):
        met.add(record)
        (chosen if selection.holds(record) else others).add(record, x)
    tally.check(source)
    return met


def _account(name: str, source: Any, tally: Tally, samples: dict[str, Sample]) -> Account:
    """The account of a pass, with the number of images that each sample kept, and why the others were not kept."""
    unkept = {
        "repeats of a picture": sum(sample.again for sample in samples.values()),
        "beyond the size of the sample": sum(sample.beyond for sample in samples.values()),
    }
    return tally.account(name, source, {title: len(sample.images()) for title, sample in samples.items()}, unkept)
