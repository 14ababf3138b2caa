"""A task: the data to forget, to retain and to hold out, and the recipe of the base model.

Rows are served by position in an endless stream that depends only on (seed, split): step s with batch size B serves positions
sB to sB + B - 1, each rank takes a contiguous part of them, and every row carries its own seed. The same global batch and seed
therefore give the same data, noise and timesteps for any number of workers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from methods.base import Goal
from methods.rows import SEEDS, Batch, Draw, Rows
from raysweep.models.noise import row_seeds
from raysweep.plugins import family_code
from raysweep.registry import resolve
from raysweep.storage.cache import load_tensors, save_tensors
from raysweep.storage.files import StoreError
from raysweep.storage.seeds import derive_seed
from raysweep.tasks.records import Account

# Fields that are saved as JSON; the splits are saved as tensors.
_PLAIN = (
    "name", "kind", "model", "recipe", "views", "quality", "sampling", "forget_class", "override_class", "base", "sensitive",
    "family", "class_names", "texts", "validity", "trained", "clip",
)  # fmt: skip
_OPTIONAL = ("cond", "other", "seeds", "guidance")  # tensors that a split may lack
# Pairs of splits that must not share an image.
DISJOINT = (
    ("forget", "retain"),
    ("train", "holdout"),
    ("train", "forget_holdout"),
    ("judge_probe", "judge_audit"),
)
PROMPTS = ("prompts_probe", "prompts_audit")  # splits of a concept task that hold prompts and no images
NEAR = 0.05  # images in [-1, 1] with a smaller root mean square difference count as near duplicates


@dataclass(frozen=True)
class Split:
    """Images with their conditions and labels.

    x: images (n, C, H, W) in [-1, 1], float32; (n, 0) for a split of prompts. cond: class labels (n,), tokens of captions (n, L),
    or None. groups: labels (n,) over which batches are balanced and which judges learn. other: labels (n,) in a second domain,
    such as the style if groups are objects, or None. seeds, guidance: those that the source of the prompts states for each, int64 and
    float64 (n,), -1 and NaN for prompts without; None if all are without.
    """

    x: torch.Tensor
    cond: torch.Tensor | None
    groups: torch.Tensor
    other: torch.Tensor | None = None
    seeds: torch.Tensor | None = None
    guidance: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    @cached_property
    def ids(self) -> list[str]:
        """A content hash per image."""
        return [hashlib.sha256(image.numpy().tobytes()).hexdigest()[:16] for image in self.x]

    def take(self, index: torch.Tensor) -> Split:
        """The rows at `index`, in that order."""
        cond, *others = (None if a is None else a[index] for a in (self.cond, self.other, self.seeds, self.guidance))
        return Split(self.x[index], cond, self.groups[index], *others)

    def distinct(self) -> Split:
        """Without repeated images, in order of first appearance."""
        first = {image_id: i for i, image_id in reversed(list(enumerate(self.ids)))}
        return self.take(torch.tensor(sorted(first.values()), dtype=torch.long))


def concat(*splits: Split) -> Split:
    """All rows of `splits` in order; `cond` and `other` are kept only if all of the splits have them."""

    def joined(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
        tensors = [p for p in parts if p is not None]
        return torch.cat(tensors) if len(tensors) == len(parts) else None

    cond, other = joined([s.cond for s in splits]), joined([s.other for s in splits])
    return Split(torch.cat([s.x for s in splits]), cond, torch.cat([s.groups for s in splits]), other)


@dataclass(frozen=True)
class Task:
    """One unlearning problem.

    splits: `train` = `forget` + `retain`. `holdout` and `forget_holdout` match `retain` and `forget`, but were never trained on.
        `judge_probe` and `judge_audit` are the disjoint labelled images of the two judges (labels in `groups`). A concept has
        `prompts_probe` and `prompts_audit` as well: prompts of every class (in `groups`); training and search never see the
        latter.
    kind: `points` forgets the very images of `forget`; `class` the class that they belong to; `concept` what prompts ask for.
    model, recipe: the configuration of the base's network, and its training settings (see `methods.retrain`).
    views: the metrics whose worst one is the residue. quality: the metric behind the damage. validity: the share of valid samples.
    sampling: arguments of the sampler (steps, guidance, eta); empty for models that generate nothing.
    forget_class, override_class: the class or concept to forget, and the one that replaces it.
    base: folder of the model to unlearn, if the user has one. If not `trained`, it holds weights from which base and oracles are
        trained.
    sensitive: images of what must be forgotten are blurred in the report until clicked.
    family: the model family, a key of `raysweep.models.families`.
    class_names: names of the classes 0, 1, ..., for networks that read words; empty if there are none.
    texts: the texts of each split of prompts.
    clip: folder of the CLIP model to which a text-to-image model's text encoder belongs, if the user has it.
    accounts: what was read of each source and what was left out; not saved.
    """

    name: str
    kind: Literal["points", "class", "concept"]
    model: dict[str, Any]
    recipe: dict[str, Any]
    splits: dict[str, Split]
    views: tuple[str, ...]
    quality: str
    sampling: dict[str, Any] = field(default_factory=lambda: {"steps": 10, "guidance": 1.0})
    forget_class: int | None = None
    override_class: int | None = None
    base: str | None = None
    sensitive: bool = True
    family: str = "pixel-ddpm"
    class_names: tuple[str, ...] = ()
    validity: str = "classifier.validity"
    texts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    trained: bool = True
    clip: str | None = None
    accounts: tuple[Account, ...] = ()

    def __post_init__(self) -> None:
        for name in ("forget", "retain"):
            if not len(self.splits[name]):
                raise ValueError(f"task {self.name}: the {name} set is empty")
        for first, second in DISJOINT:
            both = set(self.splits[first].ids) & set(self.splits[second].ids)
            if both:
                raise ValueError(f"task {self.name}: {len(both)} images are both in {first} and in {second}")
        if self.kind == "concept":
            self._check_prompts()

    def _check_prompts(self) -> None:
        searched, audited = (self.splits[name] for name in PROMPTS)
        both = {tuple(p) for p in searched.cond.tolist()} & {tuple(p) for p in audited.cond.tolist()}  # type: ignore[union-attr]
        if both:
            one, other = (next((t for t in self._texts_of(name, both)), "") for name in PROMPTS)
            if one == other:
                raise ValueError(f"task {self.name}: {len(both)} prompts are used both by the search and by the audit")
            raise ValueError(
                f"task {self.name}: {len(both)} prompts of the search and of the audit are the same to the text encoder, which reads "
                f"{searched.cond.shape[1]} tokens and no capital letters: {one!r} and {other!r}"  # type: ignore[union-attr]
            )
        for name in PROMPTS:
            self._check_classes_apart(name)
            kept = torch.unique(self.splits["retain"].groups).tolist()
            missing = sorted({self.forget_class, *kept} - set(self.splits[name].groups.tolist()))
            if missing:
                shown = ", ".join(self.class_names[c] if self.class_names else str(c) for c in missing)
                raise ValueError(f"task {self.name}: {name} has no prompt for the classes {shown}")

    def _check_classes_apart(self, name: str) -> None:
        """Raises ValueError if different prompts of different classes are the same to the text encoder."""
        split, by_tokens = self.splits[name], dict[tuple[int, ...], tuple[str, int]]()
        rows = zip(self.texts.get(name, ()), split.cond.tolist(), split.groups.tolist(), strict=False)  # type: ignore[union-attr]
        for text, tokens, group in rows:
            first, first_group = by_tokens.setdefault(tuple(tokens), (text, group))
            if group != first_group and text != first:
                raise ValueError(
                    f"task {self.name}: {name} asks for different classes by prompts that are the same to the text encoder, which "
                    f"reads {len(tokens)} tokens and no capital letters: {first!r} and {text!r}"
                )

    def _texts_of(self, name: str, tokens: set[tuple[int, ...]]) -> list[str]:
        """The texts of a split's prompts that have the smallest of these rows of tokens."""
        rows = self.splits[name].cond.tolist()  # type: ignore[union-attr]
        first = min(tokens)
        return [text for text, row in zip(self.texts.get(name, ()), rows, strict=False) if tuple(row) == first]

    @cached_property
    def goal(self) -> Goal:
        """The facts that methods may use besides the images; the classes are those of the training labels, or of a concept's prompts."""
        if self.kind == "concept":
            split = self.splits[PROMPTS[0]]
            prompts = list(zip(split.groups.tolist(), map(tuple, split.cond.tolist()), strict=True))  # type: ignore[union-attr]
            first = next(tokens for group, tokens in prompts if group == self.forget_class)
            classes = tuple(dict.fromkeys(sorted(group for group, _ in prompts)))
            return Goal("concept", self.forget_class, self.override_class, classes, first, tuple(prompts))
        cond = self.splits["train"].cond
        classes = () if cond is None or self.kind != "class" else tuple(torch.unique(cond).tolist())
        return Goal(self.kind, self.forget_class, self.override_class, classes)

    @property
    def model_kind(self) -> str:
        """The kind of its models: "diffusion" or "contrastive"."""
        kind: str = resolve("family", self.family).model_kind
        return kind

    @property
    def given_base(self) -> str | None:
        """Folder of the base model, if it is already trained."""
        return self.base if self.trained else None

    @property
    def thing(self) -> str:
        """The class or concept to forget, in words; "" for data points."""
        if self.forget_class is None:
            return ""
        name = self.class_names[self.forget_class] if self.class_names else ""
        return f"the concept {name!r}" if self.kind == "concept" else f"class {self.forget_class}"

    @cached_property
    def digest(self) -> str:
        """Content hash of everything that a result can depend on; `sensitive`, which only affects the report, is left out."""
        parts = [json.dumps({k: getattr(self, k) for k in _PLAIN if k != "sensitive"}, sort_keys=True)]
        parts += [code] if (code := family_code(self.family)) else []
        for name, split in sorted(self.splits.items()):
            labels = "" if split.cond is None else repr(split.cond.tolist())
            parts += [name, "".join(split.ids), labels, repr(split.groups.tolist())]
            parts += [repr(a.tolist()) for a in (split.other, split.seeds, split.guidance) if a is not None]
        return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]

    def near_duplicates(self) -> list[str]:
        """A message for each pair of `DISJOINT` splits that share near duplicates: similar images with different hashes."""
        problems = []
        for first, second in DISJOINT:
            a, b = self.splits[first], self.splits[second]
            close = (nearest(b.x, a.x) < NEAR).nonzero().flatten().tolist()
            if close:
                shown = ", ".join(b.ids[i] for i in close[:3]) + (", ..." if len(close) > 3 else "")
                problems.append(
                    f"{len(close)} images of {second} are nearly images of {first} (root mean square difference under {NEAR} "
                    f"on a scale from -1 to 1): {shown}; leave them out of one of the two"
                )
        return problems

    def save(self, folder: Path) -> None:
        """Writes the task, which workers then load without the libraries of its sources, and the image hashes of every split."""
        tensors: dict[str, torch.Tensor] = {}
        for name, split in self.splits.items():
            tensors |= {f"{name}.x": split.x.clone(), f"{name}.groups": split.groups.clone()}
            stated = {key: getattr(split, key) for key in _OPTIONAL}
            tensors |= {f"{name}.{key}": a.clone() for key, a in stated.items() if a is not None}
        save_file(tensors, folder / "splits.safetensors")
        hashes = {name: split.ids for name, split in self.splits.items() if name not in PROMPTS}
        (folder / "splits.json").write_text(json.dumps(hashes, indent=2))
        # the kind of models is for readers without the family's package
        plain = {k: getattr(self, k) for k in _PLAIN} | {"model_kind": self.model_kind}
        (folder / "task.json").write_text(json.dumps(plain, indent=2))

    @classmethod
    def load(cls, folder: Path) -> Task:
        """Reads a task that `save` wrote."""
        tensors = load_file(folder / "splits.safetensors")
        names = dict.fromkeys(key.split(".")[0] for key in tensors)
        splits = {
            n: Split(
                tensors[f"{n}.x"], groups=tensors[f"{n}.groups"], **{k: tensors.get(f"{n}.{k}") for k in _OPTIONAL}
            )
            for n in names
        }
        plain = json.loads((folder / "task.json").read_text())
        plain.pop("model_kind", None)
        return cls(
            **plain
            | {"splits": splits, "views": tuple(plain["views"]), "class_names": tuple(plain["class_names"])}
            | {"texts": {name: tuple(texts) for name, texts in plain["texts"].items()}}
        )

    def batch(self, draws: dict[str, Draw], seed: int, step: int, rank: int = 0, world: int = 1) -> Batch:
        """This rank's share of the global batch of `step`, for every split that a method asks for."""
        return {name: self._rows(name, draw, seed, step, rank, world) for name, draw in draws.items()}

    def all_rows(self, split: str, seed: int) -> Rows:
        """Every row of a split, once, with seeds of the stream `seed`."""
        return self._rows(split, Draw(None), seed, 0, 0, 1)

    def _rows(self, name: str, draw: Draw, seed: int, step: int, rank: int, world: int) -> Rows:
        """This rank's rows of one draw: positions in the stream of (seed, name), or of the draw's own split and stream."""
        source, stream = draw.split or name, derive_seed("rows", seed, draw.stream or name)
        step = step if draw.number is None else draw.number
        if source == SEEDS:
            assert draw.size is not None
            low, high = rank * draw.size // world, (rank + 1) * draw.size // world
            seeds = row_seeds(stream, step * draw.size + low, high - low)
            return Rows(torch.empty(high - low, 0), None, seeds, draw.size, world)
        pool = self._pool(source, draw, seed)
        size = len(pool) if draw.size is None else draw.size
        if draw.size is None:
            index = np.arange(size)
        else:
            index = self._positions(self.splits[source].groups[pool].numpy(), draw, stream, step)
        low, high = rank * size // world, (rank + 1) * size // world
        part = self.splits[source].take(torch.from_numpy(pool[index[low:high]]))
        return Rows(part.x, part.cond, row_seeds(stream, step * size + low, high - low), size, world)

    def _pool(self, name: str, draw: Draw, seed: int) -> np.ndarray:
        """Indices into the split that may be drawn: all, or those of some groups, or `per_group` of each group."""
        groups = self.splits[name].groups.numpy()
        wanted = np.unique(groups) if draw.groups is None else np.array(draw.groups)
        if draw.per_group is None:
            pool = np.flatnonzero(np.isin(groups, wanted))
        else:
            rng = np.random.Generator(np.random.Philox(derive_seed("pool", seed, name)))
            shuffled = {g: rng.permutation(np.flatnonzero(groups == g)) for g in np.unique(groups)}
            parts = [shuffled[g][: draw.per_group] for g in wanted if g in shuffled]
            pool = np.sort(np.concatenate([np.empty(0, dtype=np.int64), *parts]))
        if len(pool) == 0:
            raise ValueError(f"no row of {name} is in the groups {sorted(wanted.tolist())}")
        return pool

    @staticmethod
    def _positions(groups: np.ndarray, draw: Draw, stream: int, step: int) -> np.ndarray:
        """Indices of the batch at `step`: shuffled passes over the pool, or over each group in turn."""
        assert draw.size is not None
        positions = np.arange(step * draw.size, (step + 1) * draw.size)
        if not draw.balanced:
            return _shuffled(positions, np.arange(len(groups)), stream)
        names = np.unique(groups)
        index = np.empty(draw.size, dtype=np.int64)
        for k, g in enumerate(names):
            of_group = positions % len(names) == k
            members = np.flatnonzero(groups == g)
            index[of_group] = _shuffled(positions[of_group] // len(names), members, derive_seed(stream, k))
        return index


def encoded(task: Task, model: Any, cache: Path | None = None) -> Task:
    """The task with its images encoded as the model's network takes them (see `Diffusion.encode`).

    cache: folder where latents are kept, under the hash of images and encoder.
    """
    if not model.latent:
        return task

    def latents(split: Split) -> torch.Tensor:
        if split.x.dim() < 4:
            return split.x
        name = hashlib.sha256(f"{model.encoder_digest} {' '.join(split.ids)}".encode()).hexdigest()[:16]
        path = None if cache is None else cache / f"{name}.safetensors"
        if path is not None and path.is_file():
            with contextlib.suppress(StoreError, KeyError):  # a damaged file is written again
                return load_tensors(path)["latents"]
        parts = [model.encode(x.to(model.device, model.dtype)).float().cpu() for x in split.x.split(64)]
        # the memory layout of a loaded file: kernels round differently for another layout
        z = torch.cat(parts).clone(memory_format=torch.contiguous_format)
        if path is not None:
            save_tensors(path, {"latents": z})
        return z

    return replace(task, splits={name: replace(split, x=latents(split)) for name, split in task.splits.items()})


def nearest(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Root mean square difference (n,) of each image of a (n, ...) to the nearest of b (m, ...), computed in blocks."""
    x, y = a.float().flatten(1), b.float().flatten(1)
    return torch.cat([torch.cdist(part, y).amin(1) for part in x.split(1024)]) / x.shape[1] ** 0.5


def _shuffled(positions: np.ndarray, members: np.ndarray, stream: int) -> np.ndarray:
    """The members at `positions` of an endless stream of shuffled passes over them."""
    out = np.empty(len(positions), dtype=np.int64)
    for epoch in np.unique(positions // len(members)):
        order = np.random.Generator(np.random.Philox(derive_seed("epoch", stream, int(epoch)))).permutation(members)
        in_epoch = positions // len(members) == epoch
        out[in_epoch] = order[positions[in_epoch] % len(members)]
    return out
