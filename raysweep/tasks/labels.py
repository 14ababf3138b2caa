"""Class indices for the labels of a task's images, in the order of the model's classes if that is known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raysweep.tasks.records import SourceError, listed
from raysweep.tasks.sampling import Picked

if TYPE_CHECKING:
    import torch

MOST_CLASSES = 100_000  # labels that are larger numbers are taken for names


@dataclass(frozen=True)
class Labels:
    """The labels of both domains; a label's position is its class index. other: labels of the second domain."""

    classes: tuple[str, ...]
    other: tuple[str, ...]

    @classmethod
    def of(cls, config: Any, pictures: list[Picked], orders: set[tuple[str, ...]], numbered: bool) -> Labels:
        """The labels in the order of the config (an ImagesTask), else of the sources, else of the names.

        orders: the class orders that the sources know; numbered: whether the labels are a model's classes, whose order counts. Raises SourceError if a label is in none of the orders, or orders differ.
        """
        labels = in_order(p.label for p in pictures)
        names = config.classes or (class_order(labels, orders - {()}) if numbered else labels)
        unknown = [name for name in labels if name not in names]
        if unknown:
            raise SourceError(
                f"classes: the sources also have the labels {listed(unknown)}; list all labels in the order of the model's classes"
            )
        if config.kind != "points" and config.override is not None and config.override not in names:
            raise SourceError(f"override: {config.override!r} is not a label; there are: {listed(names)}")
        return cls(names, in_order(p.other for p in pictures))

    def check_model(self, config: Any, model: Any, pictures: list[Picked]) -> None:
        """Raises SourceError if a label's class index is beyond those of a class-conditional model."""
        count = getattr(model, "null_label", None)
        used = {p.label for p in pictures} | {config.override}
        last = max((n for n, name in enumerate(self.classes) if name in used), default=0)
        if count is not None and last >= count:
            raise SourceError(
                f"classes: the label {self.classes[last]!r} is number {last}, and the classes of {config.base} are 0 to {count - 1} "
                f"(index {count} of its class embeddings stands for no class); list the labels in the order of the model's classes"
            )

    def number(self, label: str | None) -> int:
        """The class index of a label; images without one form a group after all classes."""
        return len(self.classes) if label is None else self.classes.index(label)

    def others(self, labels: list[str | None]) -> torch.Tensor | None:
        """Indices of labels of the second domain, (n,), or None unless every row has one that images also have."""
        import torch

        known = [self.other.index(o) for o in labels if o in self.other]
        return torch.tensor(known, dtype=torch.long) if self.other and len(known) == len(labels) else None


def in_order(labels: Iterable[str | None]) -> tuple[str, ...]:
    """All labels once: numbers by value, then words by name."""
    distinct = {label for label in labels if label is not None}
    return tuple(sorted(distinct, key=lambda n: (not n.isdecimal(), int(n) if n.isdecimal() else 0, n)))


def class_order(labels: tuple[str, ...], orders: set[tuple[str, ...]]) -> tuple[str, ...]:
    """The labels by class index: in the order of the sources, else by their values if all are numbers, else by name."""
    if len(orders) > 1:
        raise SourceError(
            "classes: the sources number their classes differently; list the labels in the order of the model's"
        )
    if orders:
        return next(iter(orders))
    are_numbers = all(name.isdecimal() and str(int(name)) == name for name in labels)
    if labels and are_numbers and int(labels[-1]) < MOST_CLASSES:
        return tuple(str(n) for n in range(int(labels[-1]) + 1))
    return labels
