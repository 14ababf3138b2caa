"""A task on a user's own model and images: forget some of the images, a class of them, or a concept that prompts ask for.

One pass over the training source sorts records into what must go (by label, by words of the caption, or by key) and what
stays; of the latter, and of the holdout, a sample of bounded size is kept that depends on the content of the images and the
seed alone, not on the order of files. So a source of any length takes the memory of the sample.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from raysweep.models.folders import is_hub_id, located, no_model
from raysweep.registry import Family, resolve
from raysweep.settings import ASIDE
from raysweep.storage.places import location
from raysweep.tasks.base import TaskSettings
from raysweep.tasks.labels import Labels
from raysweep.tasks.prompts import Prompts
from raysweep.tasks.records import Name, SourceError, Tally, listed
from raysweep.tasks.sampling import Picked, Sample, pixels
from raysweep.tasks.selecting import Selection, draw_samples
from raysweep.tasks.sources import Source

if TYPE_CHECKING:
    from raysweep.tasks.task import Split, Task

__all__ = ["ImagesTask", "Sample", "Selection", "images_task", "pixels"]
# What the search minimises: of a diffusion model by what is forgotten, of a contrastive one by whether it answers questions.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "points": {
        "views": ("reconstruction.correlation", "denoising.forget_log_loss", "generation.rate"),
        "quality": "fidelity.frechet",
    },
    "class": {
        "views": ("classifier.recognised", "classifier.leak", "relearning.presence"),
        "quality": "fidelity.frechet",
    },
    "contrastive": {
        "views": ("contrast.recognised", "contrast.forget_similarity"),
        "quality": "contrast.retain_loss",
        "validity": "contrast.validity",
    },
    "answers": {
        "views": ("questions.forget_accuracy", "contrast.recognised"),
        "quality": "questions.retain_error",
        "validity": "questions.validity",
    },
}


class ImagesTask(TaskSettings):
    """Forget images, a class of images, or a concept that prompts ask for, of a model of your own."""

    name: Literal["images"] = "images"
    kind: Literal["points", "class", "concept"] = Field(
        "points",
        description="forget these very images (and duplicates of them), the class they are of, or the concept that "
        "prompts ask for: a thing, a style, a person",
    )
    base: str = Field(description="the model that must forget: its folder, or its id on the Hugging Face hub")
    trained: bool = Field(
        True,
        description="false: the folder holds weights from which the base, and each oracle, is trained by `base_steps`",
    )
    revision: str | None = Field(
        None, description="commit of the model on the hub; without one it may change under you"
    )
    clip: str | None = Field(
        None,
        description="text-to-image models: the CLIP model that the text encoder is of, a folder of transformers or its id "
        "on the hub; SLUG's losses are those of this model, if you ask for them (spaces.slug.loss)",
    )
    clip_revision: str | None = Field(None, description="commit of that model on the hub")
    train: Source = Field(description="what the model was trained on, or a part of it")
    forget: Selection = Field(description="which records of it must go")
    holdout: Source = Field(description="images of the same kinds that the model was never trained on")
    classes: tuple[Name, ...] = Field(
        (),
        description="labels in the order of the model's class indices; empty: the order that the source knows (torchvision, a "
        "ClassLabel of the hub), numbers as they are, or words in order",
    )
    search_prompts: Prompts | None = Field(None, description="concept: prompts of every class, for training and search")
    audit_prompts: Prompts | None = Field(None, description="concept: other prompts of every class, for the audit")
    questions: tuple[str, str] = Field(
        ("Who is in this picture?", "Do you know who this is?"),
        description="vision-language models: what is asked about a picture by the search, and by the audit",
    )
    override: Name | None = Field(None, description="label that stands in for a forgotten class")
    retain_images: int = Field(2000, ge=20, description="at most so many retained images are used")
    forget_images: int = Field(1000, ge=1, description="at most so many forgotten ones")
    holdout_images: int = Field(1000, ge=20, description="at most so many held-out ones")
    steps: int = Field(50, ge=1, description="steps of the sampler")
    guidance: float = Field(1.0, ge=0, description="classifier-free guidance of the sampler: eps_0 + g (eps_c - eps_0)")
    eta: float = Field(
        0.0, ge=0, le=1, description="noise that the sampler adds at each step: 0 none (DDIM), 1 as DDPM"
    )
    base_steps: int = Field(0, ge=0, description="optimiser steps of each oracle; 0: oracles are given (oracle_models)")
    recipe: dict[str, Any] = Field(default_factory=dict, description="other settings of their training (see `retrain`)")
    seed: int = Field(0, ge=0, description="seed of the samples of records")
    sensitive: Annotated[bool, ASIDE] = Field(
        True, description="blur pictures of what must be forgotten in the report until clicked"
    )

    @field_validator("base", "clip")
    @classmethod
    def _absolute(cls, name: str | None) -> str | None:
        return name if name is None or is_hub_id(name) else location(name)

    @model_validator(mode="after")
    def _fits_together(self, info: ValidationInfo):
        if self.kind != "points" and len(self.forget.labels) != 1:
            raise ValueError(f"forget.labels: a {self.kind} is named by exactly one label")
        known = info.context or {}
        if not known.get("stored"):
            _check_recipe(self.recipe)
        if not self.trained and not self.base_steps:
            raise ValueError("base_steps: how long are base and oracles to be trained?")
        if self.kind == "concept" and (self.search_prompts is None or self.audit_prompts is None):
            raise ValueError("search_prompts, audit_prompts: a concept needs both")
        if not (known.get("absent") or known.get("stored")):
            for key, name in (("base", self.base), ("clip", self.clip)):
                if name is not None and not Path(name).is_dir() and not is_hub_id(name):
                    raise ValueError(f"{key}: {no_model(name)}")
        return self

    @property
    def warnings(self) -> list[str]:
        """What works and is still unwise."""
        named = (("revision", self.base, self.revision), ("clip_revision", self.clip, self.clip_revision))
        return [
            f"task.{key}: {name} is not pinned to a commit: the same config may mean another model tomorrow"
            for key, name, revision in named
            if name is not None and is_hub_id(name) and revision is None
        ]

    def build(self) -> Task:
        """Reads the sources and cuts the splits."""
        return images_task(self)


def _check_recipe(recipe: dict[str, Any]) -> None:
    from methods.retrain import RetrainSettings

    unknown = sorted(set(recipe) - (set(RetrainSettings.model_fields) - {"steps", "split"}))
    if unknown:
        raise ValueError(f"recipe: {', '.join(unknown)}: not a setting of `retrain`")
    RetrainSettings(**recipe)


def _sampling(config: ImagesTask) -> dict[str, Any]:
    """How its models are sampled."""
    noise = {"eta": config.eta} if config.eta else {}
    return {"steps": config.steps, "guidance": config.guidance} | noise


def _objectives(kind: str, family: Family) -> dict[str, Any]:
    """The metrics that the search minimises on models of a family."""
    if family.model_kind == "contrastive":
        return OBJECTIVES["answers" if "answers" in family.abilities else "contrastive"]
    return OBJECTIVES["points" if kind == "points" else "class"]


def images_task(config: ImagesTask) -> Task:
    """Reads both sources once and builds the task; raises SourceError if something needed is not there."""
    from raysweep.models import families
    from raysweep.tasks.task import Task, concat

    folder = located(config.base, config.revision)
    model = families.load(folder)
    family: Family = resolve("family", model.family)
    if config.kind == "concept" and "caption" not in family.conditions:
        raise SourceError(f"kind: a concept is asked for by prompts, and {config.base} is a {model.family} model")
    if config.kind != "concept" and family.model_kind == "contrastive":
        raise SourceError(f"kind: a model that draws nothing forgets a concept, not {config.kind}")
    unknown = sorted(set(config.recipe.get("modules", ())) - {n.split(".")[0] for n, _ in model.net.named_parameters()})
    if unknown:
        raise SourceError(f"recipe.modules: {config.base} has no {', '.join(unknown)}")
    if config.clip is not None and not family.text_to_image:
        raise SourceError(f"clip: is for text-to-image models, and {config.base} is a {model.family} model")
    required = ("caption",) * ("caption" in family.conditions) + ("label",) * (config.kind != "points")
    samples, accounts = draw_samples(config, model.image_shape, required)
    if config.kind == "points":
        _move_duplicates(samples)
    _check_sizes(config, samples)
    pictures = [p for sample in samples.values() for p in sample]
    labels = Labels.of(config, pictures, {tuple(order) for account in accounts for order in account["class_orders"]})
    if config.kind == "class":
        labels.check_model(config, model, pictures)
    split = partial(_split, config, model, labels)
    by_class = config.kind != "points"
    held, of_kind = samples["holdout"], samples["of_kind"]
    kind_holdout, rest = (of_kind, held) if by_class else (held[::2], held[1::2])
    judged = [*samples["retain"], *(samples["forget"] if by_class else [])]
    forget, retain = split(samples["forget"]), split(samples["retain"])
    prompts, texts, asked = _prompts(config, model, labels)
    if "answers" in family.abilities:
        texts |= {f"question_{judge}": (q,) for judge, q in zip(("probe", "audit"), config.questions, strict=True)}
    return Task(
        name=config.name,
        kind=config.kind,
        model={},
        recipe={**config.recipe, "steps": max(1, config.base_steps)},
        splits={
            "forget": forget,
            "retain": retain,
            "train": concat(retain, forget),
            "holdout": split(rest),
            "forget_holdout": split(kind_holdout),
            "judge_probe": split(judged[::2]),
            "judge_audit": split(judged[1::2]),
            **prompts,
        },
        **_objectives(config.kind, family),
        sampling=_sampling(config) if family.model_kind == "diffusion" else {},
        forget_class=labels.classes.index(config.forget.labels[0]) if by_class else None,
        override_class=None if config.override is None or not by_class else labels.classes.index(config.override),
        base=str(folder),
        trained=config.trained,
        clip=None if config.clip is None else str(located(config.clip, config.clip_revision)),
        sensitive=config.sensitive,
        family=model.family,
        class_names=labels.classes if by_class else (),
        texts=texts,
        accounts=(*accounts, *asked),
    )


def _check_sizes(config: ImagesTask, samples: dict[str, list[Picked]]) -> None:
    """Raises SourceError if there are too few pictures for both judges, or for what they are compared with."""
    for name, source in (("retain", config.train), ("holdout", config.holdout)):
        count = len(samples[name])
        if count < 2:
            raise SourceError(
                f"{source}: {count or 'no'} picture is left for the {name} set, and two at least are needed"
                + (" (pictures that are, or nearly are, a forgotten one go with it)" if config.kind == "points" else "")
            )


def _move_duplicates(samples: dict[str, list[Picked]]) -> None:
    """Retained pictures that are, or nearly are, a forgotten one go with it: they would keep it alive."""
    import torch

    from raysweep.tasks.task import NEAR, nearest

    stay, go = (torch.stack([p.x for p in samples[name]]) for name in ("retain", "forget"))
    close = (nearest(stay, go) < NEAR).tolist()
    samples["forget"] += [p for p, near in zip(samples["retain"], close, strict=True) if near]
    samples["retain"] = [p for p, near in zip(samples["retain"], close, strict=True) if not near]


def _split(config: ImagesTask, model: Any, labels: Labels, pictures: list[Picked]) -> Split:
    import torch

    from raysweep.tasks.task import Split

    groups = torch.tensor([labels.number(p.label) for p in pictures])
    cond = groups if config.kind == "class" else None
    if "caption" in resolve("family", model.family).conditions:
        cond = model.tokens([p.caption or "" for p in pictures])
    return Split(torch.stack([p.x for p in pictures]), cond, groups, labels.others([p.other for p in pictures]))


def _prompts(
    config: ImagesTask, model: Any, labels: Labels
) -> tuple[dict[str, Split], dict[str, tuple[str, ...]], list[dict[str, Any]]]:
    """The splits of prompts of a concept, their texts, and the accounts of their files."""
    import torch

    from raysweep.tasks.task import PROMPTS, Split

    splits: dict[str, Split] = {}
    texts: dict[str, tuple[str, ...]] = {}
    accounts: list[dict[str, Any]] = []
    for name, key in zip(PROMPTS, ("search_prompts", "audit_prompts"), strict=True) if config.kind == "concept" else ():
        tally, prompts = Tally(), getattr(config, key)
        every = prompts.rows(tally)
        for text, label, _ in every:
            if label not in labels.classes:
                tally.ignore(f"a prompt of {label!r}, which no image is of", text[:60])
        rows = [row for row in every if row[1] in labels.classes]
        if config.forget.labels[0] not in {label for _, label, _ in rows}:
            raise SourceError(
                f"{key}: no prompt is of {config.forget.labels[0]!r}; prompts are of: {listed(r[1] for r in every)}"
            )
        groups = torch.tensor([labels.classes.index(label) for _, label, _ in rows], dtype=torch.long)
        texts[name] = tuple(text for text, _, _ in rows)
        others = labels.others([other for _, _, other in rows])
        splits[name] = Split(torch.empty(len(rows), 0), model.tokens(list(texts[name])), groups, others)
        accounts.append(tally.account(key, prompts, {"prompts": len(rows)}))
    return splits, texts, accounts
