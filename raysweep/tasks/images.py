"""A task on a user's own model and images: forget some of the images, a class of them, or a concept that prompts ask for.

One pass over the training source sorts records into those to forget (by label, words of the caption, or key) and those to
retain. Samples of bounded size are drawn, by a hash of image and seed, so they do not depend on the order of files, and a source
of any length needs only the memory of the samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from raysweep.models.folders import is_hub_id, located, no_model
from raysweep.records import Family
from raysweep.registry import resolve
from raysweep.settings import ASIDE
from raysweep.storage.places import location
from raysweep.tasks.alike import apart, separate
from raysweep.tasks.base import OBJECTIVES, ObjectiveMetrics, TaskSettings
from raysweep.tasks.labels import Labels
from raysweep.tasks.prompts import PromptRow, Prompts
from raysweep.tasks.records import Account, Name, SourceError, Tally, listed
from raysweep.tasks.sampling import Picked
from raysweep.tasks.selecting import Selection, draw_samples
from raysweep.tasks.sources import Source

if TYPE_CHECKING:
    import torch

    from raysweep.tasks.task import Split, Task


class ImagesTask(TaskSettings):
    """Forget images, a class of images, or a concept that prompts ask for, in your own model."""

    name: Literal["images"] = "images"
    kind: Literal["points", "class", "concept"] = Field(
        "points",
        description="points: forget the selected images and their duplicates; class: the class that they belong to; concept: "
        "the thing, style or person that prompts ask for",
    )
    base: str = Field(description="the model that must forget: a folder, or an id on the Hugging Face hub")
    trained: bool = Field(
        True,
        description="true: the folder holds the model that must forget; false: it holds initial weights, from which the base and "
        "the oracles are trained for `base_steps`",
    )
    revision: str | None = Field(
        None, description="commit of the model on the hub; null: its newest, which may change between runs"
    )
    clip: str | None = Field(
        None,
        description="text-to-image models: the CLIP model to which the text encoder belongs, a folder of transformers or an id on "
        "the hub; used by SLUG's CLIP losses (spaces.slug.loss)",
    )
    clip_revision: str | None = Field(None, description="commit of that CLIP model on the hub")
    train: Source = Field(description="the images that the model was trained on, or a part of them")
    forget: Selection = Field(description="the records of `train` that must be forgotten")
    holdout: Source = Field(description="images of the same kinds that the model was never trained on")
    classes: tuple[Name, ...] = Field(
        (),
        description="labels in the order of the model's class indices; empty: the order that the source knows (torchvision, "
        "ClassLabel of the hub), else numbers by value and words by name",
    )
    search_prompts: Prompts | None = Field(None, description="concept: prompts of every class, for training and search")
    audit_prompts: Prompts | None = Field(None, description="concept: other prompts of every class, for the audit")
    questions: tuple[str, str] = Field(
        ("Who is in this picture?", "Do you know who this is?"),
        description="vision-language models: the questions about a picture that the search and the audit ask",
    )
    override: Name | None = Field(None, description="label that replaces the forgotten class, for methods that relabel")
    retain_images: int = Field(2000, ge=20, description="largest number of retained images that are used")
    forget_images: int = Field(1000, ge=1, description="largest number of forgotten images that are used")
    holdout_images: int = Field(1000, ge=20, description="largest number of held-out images that are used")
    steps: int = Field(50, ge=1, description="steps of the sampler")
    guidance: float = Field(
        1.0, ge=0, description="classifier-free guidance g of the sampler, eps_0 + g (eps_c - eps_0); 1: none"
    )
    eta: float = Field(
        0.0, ge=0, le=1, description="noise that the sampler adds at each step, 0 to 1; 0: none (DDIM), 1: as DDPM"
    )
    base_steps: int = Field(0, ge=0, description="optimiser steps of each oracle; 0: oracles are given (oracle_models)")
    recipe: dict[str, Any] = Field(
        default_factory=dict, description="other settings of the oracles' training (see the method `retrain`)"
    )
    seed: int = Field(0, ge=0, description="seed of the samples of images")
    sensitive: Annotated[bool, ASIDE] = Field(
        True, description="blur images of what must be forgotten in the report until clicked"
    )

    @field_validator("base", "clip")
    @classmethod
    def _absolute(cls, name: str | None) -> str | None:
        return name if name is None or is_hub_id(name) else location(name)

    @model_validator(mode="after")
    def _fits_together(self, info: ValidationInfo) -> Self:
        if self.kind != "points" and len(self.forget.labels) != 1:
            raise ValueError(f"forget.labels: a {self.kind} is named by exactly one label")
        context = info.context or {}
        if not context.get("stored"):
            _check_recipe(self.recipe)
        if not self.trained and not self.base_steps:
            raise ValueError("base_steps: must be at least 1 if base and oracles are trained here (trained: false)")
        if self.kind == "concept" and (self.search_prompts is None or self.audit_prompts is None):
            raise ValueError("search_prompts, audit_prompts: a concept needs both")
        if self.search_prompts is not None and self.search_prompts.seeded:
            raise ValueError(
                "search_prompts: seed: only the audit draws prompts with seeds of their own (audit_prompts)"
            )
        if not (context.get("absent") or context.get("stored")):
            for key, name in (("base", self.base), ("clip", self.clip)):
                if name is not None and not Path(name).is_dir() and not is_hub_id(name):
                    raise ValueError(f"{key}: {no_model(name)}")
        return self

    @property
    def warnings(self) -> list[str]:
        """Non-fatal problems, to display."""
        models = (("revision", self.base, self.revision), ("clip_revision", self.clip, self.clip_revision))
        return [
            f"task.{key}: {name} is not pinned to a commit: the same config may mean another model tomorrow"
            for key, name, revision in models
            if name is not None and is_hub_id(name) and revision is None
        ]

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampler's arguments."""
        noise = {"eta": self.eta} if self.eta else {}
        return {"steps": self.steps, "guidance": self.guidance} | noise

    def build(self) -> Task:
        """Reads the sources and cuts the splits."""
        return images_task(self)


def _check_recipe(recipe: dict[str, Any]) -> None:
    from methods.retrain import RetrainSettings

    unknown = sorted(set(recipe) - (set(RetrainSettings.model_fields) - {"steps", "split"}))
    if unknown:
        raise ValueError(f"recipe: {', '.join(unknown)}: not a setting of `retrain`")
    RetrainSettings(**recipe)


def _objectives(kind: str, family: Family) -> ObjectiveMetrics:
    """The metrics that the search minimises on models of a family."""
    if family.model_kind == "contrastive":
        return OBJECTIVES["answers" if "answers" in family.abilities else "contrastive"]
    return OBJECTIVES["points" if kind == "points" else "class"]


def images_task(config: ImagesTask) -> Task:
    """Reads both sources once and builds the task; raises SourceError if something it needs is missing."""
    from raysweep.models import families
    from raysweep.tasks.task import Task

    folder = located(config.base, config.revision)
    model = families.load(folder)
    family: Family = resolve("family", model.family)
    _check_model(config, model, family)
    by_label = _asked_by_label(config, model)
    required = ("caption",) * ("caption" in family.conditions) + ("label",) * (by_label or config.kind != "points")
    samples, accounts = draw_samples(config, model.image_shape, required)
    separate(samples, accounts, config.kind)
    _check_sizes(config, samples)
    pictures = [p for sample in samples.values() for p in sample]
    said = list(dict.fromkeys(p.caption or "" for p in pictures))
    captions = Tally(seen=len(said))
    _note_cut(model, said, captions)
    accounts += [captions.account("captions", "the drawn images")] if captions.notes else []
    orders = {tuple(order) for account in accounts for order in account["class_orders"]}
    labels = Labels.of(config, pictures, orders, by_label)
    if by_label:
        labels.check_model(config, model, pictures)
    prompts = _read_prompts(config, model, labels) if config.kind == "concept" else _PromptSets()
    if "answers" in family.abilities:
        prompts.texts |= {"question_probe": config.questions[:1], "question_audit": config.questions[1:]}
    by_class = config.kind != "points"
    return Task(
        name=config.name,
        kind=config.kind,
        model={},
        recipe={**config.recipe, "steps": max(1, config.base_steps)},
        splits=_splits(config, model, labels, samples, accounts[0]) | prompts.splits,
        **vars(_objectives(config.kind, family)),
        sampling=config.sampling if family.model_kind == "diffusion" else {},
        forget_class=labels.classes.index(config.forget.labels[0]) if by_class else None,
        override_class=None if config.override is None or not by_class else labels.classes.index(config.override),
        base=str(folder),
        trained=config.trained,
        clip=None if config.clip is None else str(located(config.clip, config.clip_revision)),
        sensitive=config.sensitive,
        family=model.family,
        class_names=labels.classes if by_class else (),
        texts=prompts.texts,
        accounts=(*accounts, *prompts.accounts),
    )


def _check_model(config: ImagesTask, model: Any, family: Family) -> None:
    """Raises SourceError if a model of this family cannot have such a task."""
    if config.kind == "concept" and "caption" not in family.conditions:
        raise SourceError(f"kind: a concept is asked for by prompts, and {config.base} is a {model.family} model")
    if config.kind != "concept" and family.model_kind == "contrastive":
        raise SourceError(f"kind: a model that generates no images forgets a concept, not {config.kind}")
    unknown = sorted(set(config.recipe.get("modules", ())) - {n.split(".")[0] for n, _ in model.net.named_parameters()})
    if unknown:
        raise SourceError(f"recipe.modules: {config.base} has no {', '.join(unknown)}")
    if config.clip is not None and not family.text_to_image:
        raise SourceError(f"clip: is for text-to-image models, and {config.base} is a {model.family} model")


def _asked_by_label(config: ImagesTask, model: Any) -> bool:
    """Whether images are asked for by the index of their class: those of a class, and single images of a class-conditional model."""
    if config.kind != "points":
        return config.kind == "class"
    return "label" in resolve("family", model.family).conditions and bool(model.net.config.num_class_embeds)


def _check_sizes(config: ImagesTask, samples: dict[str, list[Picked]]) -> None:
    """Raises SourceError if a sample has too few images to be split in two, for two judges or two populations."""
    for name, source in (("retain", config.train), ("holdout", config.holdout)):
        count = len(samples[name])
        if count < 2:
            raise SourceError(
                f"{source}: {count or 'no'} picture is left for the {name} set, and at least two are needed"
                + (
                    " (duplicates and near duplicates of a forgotten picture are forgotten, too)"
                    * (config.kind == "points")
                )
            )


def _splits(
    config: ImagesTask, model: Any, labels: Labels, samples: dict[str, list[Picked]], account: Account
) -> dict[str, Split]:
    """The splits of images; what two judges or populations share a sample of is dealt out in turn."""
    from raysweep.tasks.task import concat

    by_class = config.kind != "points"
    held = samples["holdout"]
    holdout, forget_holdout = (held, samples["of_kind"]) if by_class else (held[1::2], held[::2])
    judged = [*samples["retain"], *(samples["forget"] if by_class else [])]
    forget, retain = (_split(config, model, labels, samples[name]) for name in ("forget", "retain"))
    return {
        "forget": forget,
        "retain": retain,
        "train": concat(retain, forget),
        "holdout": _split(config, model, labels, holdout),
        "forget_holdout": _split(config, model, labels, forget_holdout),
        "judge_probe": _split(config, model, labels, judged[::2]),
        "judge_audit": _split(config, model, labels, apart(judged[::2], judged[1::2], account)),
    }


def _split(config: ImagesTask, model: Any, labels: Labels, pictures: list[Picked]) -> Split:
    import torch

    from raysweep.tasks.task import Split

    groups = torch.tensor([labels.number(p.label) for p in pictures])
    cond = groups if _asked_by_label(config, model) else None
    if "caption" in resolve("family", model.family).conditions:
        cond = model.tokens([p.caption or "" for p in pictures])
    return Split(torch.stack([p.x for p in pictures]), cond, groups, labels.others([p.other for p in pictures]))


@dataclass
class _PromptSets:
    """The splits of prompts of a concept, the texts of prompts and questions, and the accounts of prompt files."""

    splits: dict[str, Split] = field(default_factory=dict)
    texts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    accounts: list[Account] = field(default_factory=list)


def _note_cut(model: Any, texts: Sequence[str], tally: Tally) -> None:
    """Notes the texts that a text-to-image model's encoders do not read to their end."""
    if hasattr(model, "too_long"):
        for reason, cut in model.too_long(list(texts)).items():
            for text in cut:
                tally.note(reason, text[:60])


def _read_prompts(config: ImagesTask, model: Any, labels: Labels) -> _PromptSets:
    """Reads the prompts of search and audit, without those of classes that have no image."""
    import torch

    from raysweep.tasks.task import PROMPTS, Split

    result = _PromptSets()
    for name, key in zip(PROMPTS, ("search_prompts", "audit_prompts"), strict=True):
        tally, prompts = Tally(), getattr(config, key)
        every = prompts.rows(tally)
        for row in every:
            if row.label not in labels.classes:
                tally.ignore(f"a prompt of {row.label!r}, which no image is of", row.prompt[:60])
        rows = [row for row in every if row.label in labels.classes]
        if config.forget.labels[0] not in {row.label for row in rows}:
            raise SourceError(
                f"{key}: no prompt is of {config.forget.labels[0]!r}; prompts are of: {listed(r.label for r in every)}"
            )
        texts = tuple(row.prompt for row in rows)
        _note_cut(model, texts, tally)
        groups = torch.tensor([labels.classes.index(row.label) for row in rows], dtype=torch.long)
        others = labels.others([row.other for row in rows])
        result.texts[name] = texts
        result.splits[name] = Split(
            torch.empty(len(rows), 0), model.tokens(list(texts)), groups, others, *_stated_draws(rows)
        )
        seeded = sum(row.seed is not None for row in rows)
        kept = {"prompts": len(rows)} | ({"of them with seeds of their own": seeded} if seeded else {})
        result.accounts.append(tally.account(key, prompts, kept))
    return result


def _stated_draws(rows: Sequence[PromptRow]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(seeds, guidance) that the prompts' sources state, as in a `Split`."""
    import torch

    if all(row.seed is None for row in rows):
        return None, None
    seeds = torch.tensor([-1 if row.seed is None else row.seed for row in rows], dtype=torch.int64)
    guidance = [math.nan if row.guidance is None else row.guidance for row in rows]
    return seeds, torch.tensor(guidance, dtype=torch.float64)
