"""Numbers the labels of a task's images: as the model's classes are numbered, where that is known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raysweep.tasks.records import SourceError, listed
from raysweep.tasks.sampling import Picked

if TYPE_CHECKING:
    import torch

MOST_CLASSES = 100_000


@dataclass(frozen=True)
class Labels:
    """The labels of both domains, in the order of their numbers."""

    own: tuple[str, ...]
    other: tuple[str, ...]

    @classmethod
    def of(cls, config: Any, pictures: list[Picked], orders: set[tuple[str, ...]]) -> Labels:
        """Those of the configuration (an ImagesTask), else of the sources or the pictures.

        orders: the class orders that the sources know. Raises SourceError if they do not fit each other.
        """
        found = _ordered(p.label for p in pictures)
        names = config.classes or (_numbered(found, orders - {()}) if config.kind == "class" else found)
        unknown = [name for name in found if name not in names]
        if unknown:
            raise SourceError(
                f"classes: the sources also have the labels {listed(unknown)}; list all labels in the order of the model's classes"
            )
        if config.kind != "points" and config.override is not None and config.override not in names:
            raise SourceError(f"override: {config.override!r} is not a label; there are: {listed(names)}")
        return cls(names, _ordered(p.other for p in pictures))

    def check_model(self, config: Any, model: Any, pictures: list[Picked]) -> None:
        """Raises SourceError if a label's number is none of a class-conditional model's classes."""
        count = getattr(model, "null_label", None)
        used = {p.label for p in pictures} | {config.override}
        last = max((n for n, name in enumerate(self.own) if name in used), default=0)
        if count is not None and last >= count:
            raise SourceError(
                f"classes: the label {self.own[last]!r} is number {last}, and the classes of {config.base} are 0 to {count - 1} "
                f"(index {count} of its class embeddings stands for no class); list the labels in the order of the model's classes"
            )

    def number(self, label: str | None) -> int:
        """The number of a label; what has none is a group of its own, after the others."""
        return len(self.own) if label is None else self.own.index(label)

    def others(self, labels: list[str | None]) -> torch.Tensor | None:
        """Numbers of labels of the second domain, if there are labels in every row, and such as images have, too."""
        import torch

        known = [self.other.index(o) for o in labels if o in self.other]
        return torch.tensor(known, dtype=torch.long) if self.other and len(known) == len(labels) else None


def _ordered(labels: Iterable[str | None]) -> tuple[str, ...]:
    """All labels once, numbers in their order before words in theirs."""
    found = {label for label in labels if label is not None}
    return tuple(sorted(found, key=lambda n: (not n.isdecimal(), int(n) if n.isdecimal() else 0, n)))


def _numbered(found: tuple[str, ...], orders: set[tuple[str, ...]]) -> tuple[str, ...]:
    """The labels by class index: as a source numbers them, as numbers that they are themselves, or in the order of names."""
    if len(orders) > 1:
        raise SourceError(
            "classes: the sources number their classes differently; list the labels in the order of the model's"
        )
    if orders:
        return next(iter(orders))
    if found and all(name.isdecimal() and str(int(name)) == name for name in found) and int(found[-1]) < MOST_CLASSES:
        return tuple(str(n) for n in range(int(found[-1]) + 1))
    return found
