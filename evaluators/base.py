"""The protocol of an evaluator, and what evaluators see of a model and its data.

An evaluator first makes raw scores, arrays whose first axis runs over independent units (a seed, an image), and then
reduces them to metrics. Metrics can therefore be recomputed, and their uncertainty estimated by leaving groups of units
out, without a model. Samples are drawn once per subject and shared by all evaluators.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np
import torch

ROWS = 50  # images that a generator puts through its network at once: another number rounds differently

T = TypeVar("T")
Scores = dict[str, np.ndarray]
Direction = Literal["min", "max", "target"]
Reach = Literal["input", "weights", "base"]


class Inapplicable(ValueError):
    """A check cannot be done on this subject for want of something; its rows are `skipped` with this reason."""


class Model(Protocol):
    """What evaluators need of a diffusion model; see `methods.base.Model` for shapes. A contrastive model has `encode_image`
    and `encode_text` instead of a noise schedule and a sampler; a vision-language model has `answers`, too."""

    net: Any
    alphas: torch.Tensor
    null_label: int | None
    sampler: dict[str, Any] | None
    latent: bool

    def with_net(self, net: Any) -> Model: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def logit_scale(self) -> torch.Tensor: ...
    def encode_image(self, x: torch.Tensor) -> torch.Tensor: ...
    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor: ...
    def encode(self, x: torch.Tensor) -> torch.Tensor: ...
    def decode(self, z: torch.Tensor) -> torch.Tensor: ...
    def answers(self, x: torch.Tensor, question: str) -> list[str]: ...
    def unconditional(self, count: int) -> torch.Tensor | None: ...
    def noise(self, seeds: torch.Tensor) -> torch.Tensor: ...
    def uniform(self, seeds: torch.Tensor, columns: int) -> torch.Tensor: ...
    def add_noise(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor: ...
    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor: ...
    def target(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor: ...
    def eps(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor: ...
    def levels(self) -> torch.Tensor: ...
    def eps_at(self, x: torch.Tensor, s: float, cond: torch.Tensor | None) -> torch.Tensor: ...
    def gamma_sigma(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...
    def reduced(self, cond: torch.Tensor) -> list[torch.Tensor]: ...
    def sample(
        self,
        cond: torch.Tensor | None,
        seeds: torch.Tensor,
        steps: int,
        guidance: float = 1.0,
        *,
        batch: int = ...,
        eta: float = 0.0,
        noise_scale: float = 1.0,
    ) -> torch.Tensor: ...
    def reconstruct(
        self,
        x0: torch.Tensor,
        seeds: torch.Tensor,
        t: int,
        steps: int,
        cond: torch.Tensor | None = None,
        batch: int = ...,
    ) -> torch.Tensor: ...


class Images(Protocol):
    """Rows of a split: images (n, C, H, W) in [-1, 1], conditions (labels (n,), or tokens (n, L)) or None, groups (n,), labels
    of a second domain (n,) or None."""

    x: torch.Tensor
    cond: torch.Tensor | None
    groups: torch.Tensor
    other: torch.Tensor | None

    def __len__(self) -> int: ...
    def distinct(self) -> Images: ...
    def take(self, index: torch.Tensor) -> Images: ...


class Task(Protocol):
    """What evaluators need of a task. A concept has classes, too: what prompts ask for, which are the groups of its splits;
    its splits `prompts_JUDGE` hold the prompts of each class that a tier of that judge uses."""

    kind: str
    model_kind: str
    splits: dict[str, Any]
    sampling: dict[str, Any]
    forget_class: int | None
    class_names: tuple[str, ...]
    texts: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Metric:
    """One measurement with its uncertainty; `value` is None where it could not be computed, and `reason` says why."""

    name: str
    value: float | None
    n: int
    se: float | None = None
    lo: float | None = None
    hi: float | None = None
    interval: str = "none"
    direction: Direction = "target"
    status: Literal["ok", "failed", "skipped"] = "ok"
    reason: str = ""


@dataclass
class Subject:
    """A model under audit, with its task, its judge and the sizes and seeds of the tier.

    judge: a classifier with `features(x)` (n, d) and `__call__(x)` logits (n, classes).
    sizes: `samples`, `noises`, `timesteps`, ... as the tier sets them.
    seeds: (stream name, count) -> int64 seeds (count,); equal for every model of the tier, so comparisons are paired.
    kept: keeps an array that depends on data and networks alone, not on the model, beyond the subject; (key, make) -> array.
    peers: the anchors by name, "base" and "oracle-K", that the subject is compared with; itself never among them unless it
        is the base.
    """

    model: Model
    task: Task
    judge: Any
    sizes: dict[str, Any]
    seeds: Callable[[str, int], torch.Tensor]
    peers: Mapping[str, Subject] = field(default_factory=dict)
    kept: Callable[[str, Callable[[], np.ndarray]], np.ndarray] | None = None
    _cache: dict[str, Any] = field(default_factory=dict)

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """`make()` at the first call with `key`, its result afterwards."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def keep(self, key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """As `once`, for what depends on the task, the judge and other fixed networks alone; `key` must name the latter."""
        return self.once(key, make if self.kept is None else lambda: self.kept(key, make))  # type: ignore[misc]

    def oracles(self) -> list[Subject]:
        """The oracles that it is compared with, itself left out."""
        return [peer for name, peer in sorted(self.peers.items()) if name.startswith("oracle") and peer is not self]

    @property
    def classed(self) -> bool:
        """Whether what must go is one of several classes, asked for by a label or by prompts."""
        return self.task.forget_class is not None

    def condition(self, classes: torch.Tensor) -> torch.Tensor:
        """What asks the model for images of `classes` (n,): the labels, or tokens (n, L), the prompts of a class in turn."""
        if self.task.kind != "concept":
            return classes
        return self.task.splits[f"prompts_{self.sizes['judge']}"].cond[self.prompts(classes)]

    def prompts(self, classes: torch.Tensor) -> torch.Tensor:
        """Which of the tier's prompts ask for images of `classes` (n,): those of a class in turn."""
        groups = self.task.splits[f"prompts_{self.sizes['judge']}"].groups
        index = torch.empty(len(classes), dtype=torch.long)
        for c in torch.unique(classes):
            own, mine = (groups == c).nonzero()[:, 0], (classes == c).nonzero()[:, 0]
            index[mine] = own[torch.arange(len(mine)) % len(own)]
        return index

    def texts(self, classes: torch.Tensor) -> list[str]:
        """What images of `classes` (n,) are asked for by, in words; for labels "a photo of a NAME."."""
        if self.task.kind != "concept":
            return [f"a photo of a {self.task.class_names[int(c)]}." for c in classes]
        texts = self.task.texts[f"prompts_{self.sizes['judge']}"]
        return [texts[int(i)] for i in self.prompts(classes)]

    def forgotten(self, count: int) -> torch.Tensor:
        """What asks for the forgotten class, `count` rows."""
        assert self.task.forget_class is not None
        return self.condition(torch.full((count,), self.task.forget_class))

    def inputs(self, images: Images) -> Images:
        """`images` as the network takes them: encoded, where it denoises latents."""
        if not self.model.latent:
            return images

        def make() -> torch.Tensor:
            model = self.model
            parts = BATCHES.map(
                lambda rows: model.encode(images.x[rows].to(model.device, model.dtype)).cpu(), len(images)
            )
            return torch.cat(parts)

        key = hashlib.sha256(images.x.numpy().tobytes()).hexdigest()
        return replace(images, x=self.once(f"inputs {key}", make))  # type: ignore[type-var]

    def generate(self, cond: torch.Tensor | None, seeds: torch.Tensor, **sampling: Any) -> torch.Tensor:
        """Images (n, C, H, W) as the task samples them, or as `sampling` says instead."""
        how = {**self.task.sampling, **sampling}

        def part(rows: slice) -> torch.Tensor:
            with self._drawing():
                return self.model.sample(None if cond is None else cond[rows], seeds[rows], batch=BATCHES.rows, **how)

        BATCHES.generated += len(seeds)
        return torch.cat(BATCHES.map(part, len(seeds)))

    def reconstruct(
        self, x0: torch.Tensor, seeds: torch.Tensor, t: int, steps: int, cond: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the model makes of x0 (n, C, H, W) noised to step t, by about `steps`."""

        def part(rows: slice) -> torch.Tensor:
            labels = None if cond is None else cond[rows]
            with self._drawing():
                return self.model.reconstruct(x0[rows], seeds[rows], t, steps, labels, batch=BATCHES.rows)

        BATCHES.generated += len(seeds)
        return torch.cat(BATCHES.map(part, len(seeds)))

    def _drawing(self) -> torch.autocast:
        """The precision of a generator's passes; its steps and all scores of given images keep that of the weights."""
        return torch.autocast(self.model.device.type, torch.bfloat16, self.sizes.get("precision") == "bf16")

    def rebuilt(self, images: Images, row: int, seeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(what the model rebuilds, the picture), each (n, C, H, W), for one row of `images` noised to `injection_t` by n seeds and
        denoised in `injection_steps` under its own condition."""
        n = len(seeds)
        x0 = images.x[row].expand(n, *images.x.shape[1:])
        cond = None if images.cond is None else images.cond[row].expand(n, *images.cond.shape[1:])
        return self.reconstruct(x0, seeds, self.sizes["injection_t"], self.sizes["injection_steps"], cond), x0

    def samples(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Images (n, C, H, W) of the retained content, and their classes (n,): over the kept classes; or, where there are none,
        by the captions of retained images, or unconditional."""

        def make() -> tuple[torch.Tensor, torch.Tensor | None]:
            n = self.sizes["samples"]
            if not self.classed:
                captions = self.task.splits["retain"].cond
                cond = None if captions is None else captions[torch.arange(n) % len(captions)]
                return self.generate(cond, self.seeds("samples", n)), None
            kept = torch.unique(self.task.splits["retain"].groups)
            classes = kept[torch.arange(n) % len(kept)]
            return self.generate(self.condition(classes), self.seeds("samples", n)), classes

        return self.once("samples", make)

    def features(self) -> np.ndarray:
        """The judge's features of `samples()`, float64 (n, d)."""
        return self.once("features", lambda: judged(self.judge.features, self.samples()[0]))

    def reference_features(self) -> np.ndarray:
        """The judge's features of the real retained images, float64 (m, d)."""
        return self.keep("reference", lambda: judged(self.judge.features, self.task.splits["retain"].x))


class Evaluator(ABC):
    """One family of checks.

    model_kinds: the kinds of models that it applies to: "diffusion", "contrastive" (which compare images with captions).
    abilities: what it needs of a model besides: "answers" (the model answers questions about images).
    kinds: the kinds of tasks that it applies to.
    directions: metric name -> which way is better; `target` means "like the oracle".
    reach: what an attacker needs who does what it does, None where it does not attack: "input" (the sampler, the noise, the
        condition), "weights", or "base" (the model before unlearning; such an attack is shown and does not count in verdicts).
        The verdict on a model reads the metrics `excess@STRENGTH` of its attacks. Classes of other packages state it; for those
        in this package raysweep's registry does, which is read without torch.
    needs, cost: what it takes, in words; controls: the models whose value for the same check gives its numbers a meaning.
    """

    name: ClassVar[str]
    model_kinds: ClassVar[frozenset[str]] = frozenset({"diffusion"})
    abilities: ClassVar[frozenset[str]] = frozenset()
    kinds: ClassVar[frozenset[str]] = frozenset({"points", "class", "concept"})
    directions: ClassVar[dict[str, Direction]]
    reach: ClassVar[Reach | None] = None
    needs: ClassVar[str]
    cost: ClassVar[str]
    controls: ClassVar[tuple[str, ...]] = ("base", "oracles")

    @abstractmethod
    def scores(self, subject: Subject) -> Scores:
        """Raw scores by name; the first axis of each array runs over independent units."""

    @abstractmethod
    def values(self, scores: Scores, subject: Subject) -> dict[str, float]:
        """Metric values from scores, or from a part of their units."""

    @abstractmethod
    def rows(self, scores: Scores, subject: Subject, replicates: dict[str, np.ndarray]) -> list[Metric]:
        """Metrics with intervals. `replicates`: each metric recomputed without each group of units in turn (groups,)."""


class Batches:
    """How many rows go through a network at once: as many as fit, found by halving when memory runs out.

    Results do not depend on it but for rounding, because every row has a seed of its own. The size stays halved for the
    process. `rows` is how many of them a generator puts through its network at once, always as many, so that an image is the
    same to the last bit in whatever company it is made. `generated`
    counts the images that subjects made.
    """

    def __init__(self, size: int = 500):
        self.size, self.halved, self.generated = size, 0, 0

    @property
    def rows(self) -> int:
        return min(self.size, ROWS)

    def map(self, function: Callable[[slice], T], count: int) -> list[T]:
        """`function(rows)` for consecutive slices of `count` rows, in order."""
        parts, start = [], 0
        while start < count:
            try:
                parts.append(function(slice(start, min(count, start + self.size))))
            except torch.OutOfMemoryError:
                if self.size == 1:
                    raise
                self.size, self.halved = self.size // 2, self.halved + 1
                continue
            start += self.size
        return parts


BATCHES = Batches()


@torch.no_grad()
def judged(network: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> np.ndarray:
    """`network(x)` in float64, evaluated in batches."""
    return torch.cat(BATCHES.map(lambda rows: network(x[rows].float()).double().cpu(), len(x))).numpy()


def without_group(scores: Scores, group: int, groups: int) -> Scores:
    """Scores without the units of one group; unit i belongs to group i mod `groups`.

    An array with fewer units than groups is kept whole: what is inferred is then conditional on these units.
    """
    return {name: a if len(a) < groups else a[np.arange(len(a)) % groups != group] for name, a in scores.items()}


def correlation(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Pearson correlation over the elements of each image, (n,), for images of broadcastable shapes (n, C, H, W)."""
    a, b = (v.double().flatten(1) - v.double().flatten(1).mean(1, keepdim=True) for v in (x, y))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-12)
