"""The protocol of an evaluator, and the protocols of the models, tasks and images that it reads.

An evaluator first computes raw scores, arrays whose first axis runs over independent units (a seed, an image), and then
reduces them to metrics. Metrics can therefore be recomputed without a model, and their uncertainty estimated by leaving
groups of units out. Samples are generated once per subject and shared by all evaluators.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch

from evaluators.batches import Batches
from evaluators.metrics import Direction, Metric

Scores = dict[str, np.ndarray]
Reach = Literal["input", "weights", "base"]


class Inapplicable(ValueError):
    """Something that a check needs is missing for this subject; its rows are `skipped` with this reason."""


class Model(Protocol):
    """A model as evaluators use it; see `methods.base.Model` for shapes.

    A contrastive model has `encode_image` and `encode_text` instead of a noise schedule and a sampler; a vision-language
    model also has `answers`. A text-to-image model also has `encoded`, the states (n, length, width) of its text encoders for tokens
    (n, L) and, if it has any, pooled ones (n, width), and `columns`, each text encoder's columns of a row of tokens, by its name in
    `net`.
    """

    net: Any
    alphas: torch.Tensor
    null_label: int | None
    sampler: Any
    latent: bool

    def with_net(self, net: Any) -> Model: ...
    @property
    def columns(self) -> dict[str, slice]: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def logit_scale(self) -> torch.Tensor: ...
    def encode_image(self, x: torch.Tensor) -> torch.Tensor: ...
    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor: ...
    def encoded(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]: ...
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
        as_pipeline: bool = False,
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
    def complete(
        self,
        x0: torch.Tensor,
        known: torch.Tensor,
        cond: torch.Tensor | None,
        seeds: torch.Tensor,
        steps: int,
        guidance: float = 1.0,
        *,
        batch: int = ...,
        eta: float = 0.0,
    ) -> torch.Tensor: ...


class Images(Protocol):
    """Rows of a split.

    x: images (n, C, H, W) in [-1, 1]. cond: labels (n,), tokens (n, L), or None. groups: (n,). other: labels (n,) of a second
    domain, or None.
    """

    x: torch.Tensor
    cond: torch.Tensor | None
    groups: torch.Tensor
    other: torch.Tensor | None

    def __len__(self) -> int: ...
    def distinct(self) -> Images: ...
    def take(self, index: torch.Tensor) -> Images: ...


class Task(Protocol):
    """A task as evaluators use it.

    The classes of a concept are the things that prompts ask for, and the groups of its splits; its split `prompts_JUDGE`
    holds the prompts of each class for tiers with that judge, and for prompts from published lists `seeds` and `guidance` (n,): those
    with which the list draws each, -1 and NaN for none; None if no prompt has a seed.
    """

    kind: str
    model_kind: str
    splits: dict[str, Any]
    sampling: dict[str, Any]
    forget_class: int | None
    class_names: tuple[str, ...]
    texts: dict[str, tuple[str, ...]]


@dataclass
class Subject:
    """A model under audit, with its task, its judge, and the sizes and seeds of the tier.

    judge: a classifier with `features(x)` (n, d) and `__call__(x)`, logits (n, classes).
    sizes: `samples`, `noises`, `loss_t`, ... as the tier sets them.
    seeds: (stream name, count) -> int64 seeds (count,); equal for every model of the tier, so comparisons are paired.
    peers: the anchors by name, "base" and "oracle-K", that the subject is compared with. The subject itself is among them
        only if it is an anchor.
    kept: stores an array that depends on data and fixed networks alone for longer than the subject lives; (key, make) ->
        array. None keeps it with the subject.
    batches: the sizes of batches, shared with the peers.
    """

    model: Model
    task: Task
    judge: Any
    sizes: dict[str, Any]
    seeds: Callable[[str, int], torch.Tensor]
    peers: Mapping[str, Subject] = field(default_factory=dict)
    kept: Callable[[str, Callable[[], np.ndarray]], np.ndarray] | None = None
    batches: Batches = field(default_factory=Batches)
    _cache: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def with_model(self, model: Model) -> Subject:
        """The same subject with another model; nothing that was computed for this one is taken over."""
        return replace(self, model=model)

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """`make()` at the first call with `key`, the same result afterwards."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def keep(self, key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Like `once`, for arrays that depend only on the task, the judge and networks named in `key`."""
        if self.kept is None:
            return self.once(key, make)
        kept = self.kept
        return self.once(key, lambda: kept(key, make))

    def oracles(self) -> list[Subject]:
        """The oracles that the subject is compared with, without itself."""
        return [peer for name, peer in sorted(self.peers.items()) if name.startswith("oracle") and peer is not self]

    @property
    def sampling_steps(self) -> int:
        """Sampler steps of an image from noise: the tier's number, or the task's if the tier has none."""
        steps: int = self.sizes.get("sampling_steps") or self.task.sampling["steps"]
        return steps

    @property
    def classed(self) -> bool:
        """Whether the task forgets one of several classes, requested by a label or by prompts."""
        return self.task.forget_class is not None

    def condition(self, classes: torch.Tensor) -> torch.Tensor:
        """Conditions that request images of `classes` (n,): labels (n,), or tokens (n, L) of the prompts of each class in turn."""
        if self.task.kind != "concept":
            return classes
        return self.task.splits[f"prompts_{self.sizes['judge']}"].cond[self.prompts(classes)]

    def prompts(self, classes: torch.Tensor) -> torch.Tensor:
        """Indices (n,) of the tier's prompts that request images of `classes` (n,): those of each class in turn."""
        groups = self.task.splits[f"prompts_{self.sizes['judge']}"].groups
        index = torch.empty(len(classes), dtype=torch.long)
        for c in torch.unique(classes):
            prompts, rows = (groups == c).nonzero()[:, 0], (classes == c).nonzero()[:, 0]
            index[rows] = prompts[torch.arange(len(rows)) % len(prompts)]
        return index

    def texts(self, classes: torch.Tensor) -> list[str]:
        """The prompts that request images of `classes` (n,); for labels "a photo of a NAME."."""
        if self.task.kind != "concept":
            return [f"a photo of a {self.task.class_names[int(c)]}." for c in classes]
        texts = self.task.texts[f"prompts_{self.sizes['judge']}"]
        return [texts[int(i)] for i in self.prompts(classes)]

    def forgotten(self, count: int) -> torch.Tensor:
        """Conditions that request the forgotten class, `count` rows."""
        assert self.task.forget_class is not None
        return self.condition(torch.full((count,), self.task.forget_class))

    def inputs(self, images: Images) -> Images:
        """`images` as the network takes them: encoded if it denoises latents."""
        if not self.model.latent:
            return images

        def encode(rows: slice) -> torch.Tensor:
            return self.model.encode(images.x[rows].to(self.model.device, self.model.dtype)).cpu()

        key = hashlib.sha256(images.x.numpy().tobytes()).hexdigest()
        latents = self.once(f"inputs {key}", lambda: torch.cat(self.batches.map(encode, len(images))))
        return replace(images, x=latents)  # type: ignore[type-var]

    def generate(self, cond: torch.Tensor | None, seeds: torch.Tensor, **sampling: Any) -> torch.Tensor:
        """Images (n, C, H, W), sampled with the task's settings in the tier's number of steps, or with those in `sampling`."""
        settings = {**self.task.sampling, "steps": self.sampling_steps, **sampling}

        def part(rows: slice) -> torch.Tensor:
            labels = None if cond is None else cond[rows]
            with self._sampling_precision():
                return self.model.sample(labels, seeds[rows], batch=self.batches.rows, **settings)

        self.batches.generated += len(seeds)
        return torch.cat(self.batches.map(part, len(seeds)))

    def reconstruct(
        self, x0: torch.Tensor, seeds: torch.Tensor, t: int, steps: int, cond: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Images (n, C, H, W) that the model makes of x0 (n, C, H, W), noised to step t, in about `steps` steps."""

        def part(rows: slice) -> torch.Tensor:
            labels = None if cond is None else cond[rows]
            with self._sampling_precision():
                return self.model.reconstruct(x0[rows], seeds[rows], t, steps, labels, batch=self.batches.rows)

        self.batches.generated += len(seeds)
        return torch.cat(self.batches.map(part, len(seeds)))

    def complete(
        self, x0: torch.Tensor, known: torch.Tensor, cond: torch.Tensor | None, seeds: torch.Tensor
    ) -> torch.Tensor:
        """Images (n, C, H, W), sampled as by `generate`, in which the part of x0 (n, C, H, W) where `known` (n, 1, H, W) is given."""
        settings = {**self.task.sampling, "steps": self.sampling_steps}

        def part(rows: slice) -> torch.Tensor:
            labels = None if cond is None else cond[rows]
            with self._sampling_precision():
                return self.model.complete(
                    x0[rows], known[rows], labels, seeds[rows], batch=self.batches.rows, **settings
                )

        self.batches.generated += len(seeds)
        return torch.cat(self.batches.map(part, len(seeds)))

    def _sampling_precision(self) -> torch.autocast:
        """Precision of the passes of a sampler. Its arithmetic and all scores of given images keep that of the weights."""
        return torch.autocast(self.model.device.type, torch.bfloat16, self.sizes.get("precision") == "bf16")

    def rebuilt(self, images: Images, row: int, seeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(reconstructions, original), each (n, C, H, W), of one row of `images`, noised to `injection_t` by n seeds and
        denoised in `injection_steps` under its own condition."""
        n = len(seeds)
        x0 = images.x[row].expand(n, *images.x.shape[1:])
        cond = None if images.cond is None else images.cond[row].expand(n, *images.cond.shape[1:])
        return self.reconstruct(x0, seeds, self.sizes["injection_t"], self.sizes["injection_steps"], cond), x0

    def samples(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Samples of the retained content (n, C, H, W) and their classes (n,), the retained ones in turn.

        Without classes (then None) they have the captions of retained images, or are unconditional.
        """

        def make() -> tuple[torch.Tensor, torch.Tensor | None]:
            n = self.sizes["samples"]
            if not self.classed:
                captions = self.task.splits["retain"].cond
                cond = None if captions is None else captions[torch.arange(n) % len(captions)]
                return self.generate(cond, self.seeds("samples", n)), None
            retained = torch.unique(self.task.splits["retain"].groups)
            classes = retained[torch.arange(n) % len(retained)]
            return self.generate(self.condition(classes), self.seeds("samples", n)), classes

        return self.once("samples", make)

    def logits(self, images: torch.Tensor) -> np.ndarray:
        """The judge's logits, float64 (n, classes), of images (n, C, H, W)."""
        return self.batches.evaluate(self.judge, images)

    def judge_features(self, images: torch.Tensor) -> np.ndarray:
        """The judge's features, float64 (n, d), of images (n, C, H, W)."""
        return self.batches.evaluate(self.judge.features, images)

    def features(self) -> np.ndarray:
        """The judge's features of `samples()`, float64 (n, d)."""
        return self.once("features", lambda: self.judge_features(self.samples()[0]))

    def reference_features(self) -> np.ndarray:
        """The judge's features of the real retained images, float64 (m, d)."""
        return self.keep("reference", lambda: self.judge_features(self.task.splits["retain"].x))


class Evaluator(ABC):
    """One family of checks.

    model_kinds: the kinds of models that it applies to: "diffusion", "contrastive" (which compare images with captions).
    abilities: what it also needs of a model: "answers" (the model answers questions about images).
    kinds: the kinds of tasks that it applies to.
    directions: metric name -> which way is better; `target` means "like the oracle".
    reach: what an attacker must control, None for a check that is no attack: "input" (the sampler, the noise, the condition),
        "weights", or "base" (the model before unlearning; such an attack is shown but does not count in verdicts). The
        verdict on a model reads the metrics `excess@STRENGTH` of its attacks. Classes of other packages state it; for those
        in this package raysweep's registry does, which is read without torch.
    needs, cost: requirements and cost, for people. controls: the models whose values for the same check are the controls.
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


def without_group(scores: Scores, group: int, groups: int) -> Scores:
    """Scores without the units of one group; unit i belongs to group i mod `groups`.

    An array with fewer units than groups stays whole: inference is then conditional on these units.
    """
    return {name: a if len(a) < groups else a[np.arange(len(a)) % groups != group] for name, a in scores.items()}


def correlation(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Pearson correlation over the elements of each image, (n,), for images of broadcastable shapes (n, C, H, W)."""
    a, b = (v.double().flatten(1) - v.double().flatten(1).mean(1, keepdim=True) for v in (x, y))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-12)
