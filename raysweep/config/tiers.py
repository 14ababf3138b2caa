"""Settings of the audit: its three tiers of checks, and how many candidates they measure."""

from __future__ import annotations

import hashlib
import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from raysweep.config import draws
from raysweep.config.sections import Section, is_stored
from raysweep.registry import EVALUATORS, attacks, checks_by_weights, names, suggest
from raysweep.settings import ASIDE
from raysweep.storage.files import digest_of_files
from raysweep.storage.places import Place
from raysweep.storage.seeds import derive_seed
from raysweep.tasks.base import HasObjectives

Drawn = dict[str, dict[str, Any]]  # tier -> setting -> the value that was drawn for an audit


class Tier(Section):
    """One tier of the audit: its checks, sample sizes and seeds.

    `in_force` fills in what is null because it is drawn.
    """

    seed: int | None = Field(
        None,
        ge=0,
        lt=2**draws.SEED_BITS,
        description="seed of every random draw of the tier; tiers must differ; null: drawn when an audit starts",
    )
    judge: Literal["probe", "audit"] = Field(
        description="the judge (classifier of this task's images) that is used; the two learn from disjoint images"
    )
    checks: tuple[str, ...] | None = Field(
        None, description="evaluators, by name (`raysweep ls evaluators`); null: those that the objectives need"
    )
    groups: int = Field(10, ge=2, le=100, description="groups of units that the jackknife leaves out in turn, 2 to 100")
    samples: int = Field(200, ge=20, description="samples of the retained content, at least `groups`")
    class_samples: int = Field(60, ge=10, description="samples of the forgotten class or concept, at least `groups`")
    noises: int = Field(40, ge=2, description="noise draws per reconstruction, at least `groups`")
    sampling_steps: int | None = Field(
        None,
        ge=0,
        description="sampler steps of samples; 0: the task's `steps`; null: drawn between 0.6 and 1.5 times these",
    )
    injection_t: int | None = Field(
        None,
        ge=1,
        description="diffusion timestep to which an image is noised for reconstruction; null: drawn between 0.5 and 0.7 of the "
        "schedule",
    )
    injection_steps: int | None = Field(
        None, ge=1, description="sampler steps of a reconstruction; null: drawn between 9 and 15"
    )
    loss_noises: int = Field(10, ge=2, description="noise draws per image of a denoising loss, at least `groups`")
    loss_images: int = Field(4, ge=1, description="images per split of denoising losses")
    timesteps: int = Field(10, ge=1, description="number of diffusion timesteps of a denoising loss, if they are drawn")
    loss_t: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        description="diffusion timesteps of a denoising loss; null: one drawn in each of `timesteps` equal parts of the schedule",
    )
    membership_t: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        description="diffusion timesteps at which membership is scored; null: five drawn, up to 0.35 of the schedule",
    )
    membership_stride: int | None = Field(
        None, ge=1, description="timesteps between the passes of SecMI; null: drawn, 0.007 to 0.013 of the schedule"
    )
    membership_noises: int = Field(4, ge=1, description="noise draws per image and timestep of the membership score")
    membership_images: int = Field(
        100, ge=2, description="images per population (forgotten, held out) of membership inference"
    )
    relearn_steps: tuple[int, ...] = Field(
        (5,), min_length=1, description="optimiser steps after which relearning is measured, each value in turn"
    )
    inversion_steps: int = Field(
        150,
        ge=1,
        description="optimiser steps of the inversion attack, which searches for an embedding of the forgotten class",
    )
    prompt_tokens: int = Field(3, ge=1, description="tokens that the attack unlearndiffatk puts before prompts")
    prompt_steps: int = Field(150, ge=1, description="optimiser steps of unlearndiffatk's search for these tokens")
    prompt_candidates: int = Field(
        100, ge=4, description="prompts in each generation of ring_a_bell's search, which replaces whole prompts"
    )
    prompt_generations: int = Field(500, ge=1, description="generations of ring_a_bell's search, for each prompt")
    recall_t: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        description="diffusion timesteps of the reconstruction curve; null: five drawn, between 0.05 and 0.9 of the schedule",
    )
    recall_noises: int = Field(6, ge=2, description="noise draws per image and timestep of the reconstruction curve")
    recall_images: int = Field(20, ge=1, description="images per population of the reconstruction curve")
    likelihood_steps: int | None = Field(
        None, ge=2, description="steps of the ODE solver of the likelihood; null: drawn between 16 and 24"
    )
    likelihood_probes: int = Field(
        5, ge=1, description="random directions per image that estimate the divergence in the likelihood"
    )
    weights: dict[Literal["sscd", "clip", "dino", "inception", "classifier", "detector"], Place] = Field(
        default_factory=dict, description="files of external networks, by kind; each adds the checks that need it"
    )
    strips: int = Field(0, ge=0, le=32, description="samples saved as pictures for the report, 0 to 32")
    full_fidelity: bool = Field(True, description="measure KID, precision and recall besides the Frechet distance")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="precision of the network when images are generated; losses and scores always use fp32"
    )

    @field_validator("checks")
    @classmethod
    def _known(cls, value: tuple[str, ...] | None, info: ValidationInfo) -> tuple[str, ...] | None:
        valid = names("evaluator")
        for name in value or ():
            if name not in valid and not is_stored(info):
                raise ValueError(f"{name!r} is not an evaluator{suggest(name, valid)}")
        return value

    @model_validator(mode="after")
    def _enough_units(self, info: ValidationInfo) -> Self:
        for kind, path in self.weights.items():
            if not path.exists() and not (info.context or {}).get("absent") and not is_stored(info):
                raise ValueError(f"weights.{kind}: {path} does not exist")
        for name in self.checks or ():
            key = checks_by_weights().get(name)
            if key is not None and key not in self.weights:
                raise ValueError(f"checks: {name!r} needs weights.{key}")
        for key in ("samples", "class_samples", "noises", "loss_noises"):
            if getattr(self, key) < self.groups:
                raise ValueError(f"{key}: {getattr(self, key)} units cannot form {self.groups} groups of the jackknife")
        return self

    def checks_for(self, task: HasObjectives) -> tuple[str, ...]:
        """The checks of this tier: the configured ones, or those that the task's objectives need; then those of `weights`."""
        needed = dict.fromkeys(metric.split(".")[0] for metric in (*task.views, task.quality, task.validity))
        chosen = self.checks if self.checks is not None else tuple(needed)
        by_weights = (name for name, key in checks_by_weights().items() if key in self.weights)
        return tuple(dict.fromkeys((*chosen, *by_weights)))

    @property
    def digest(self) -> str:
        """Hash of every setting and of the contents of the weights' files."""
        settings = self.model_dump_json(exclude={"weights"}) + self.weights_digest
        return hashlib.sha256(settings.encode()).hexdigest()[:16]

    @property
    def weights_digest(self) -> str:
        """Hash of the contents of all weights' files."""
        return ",".join(f"{key}={digest_of_files(path)}" for key, path in sorted(self.weights.items()))

    def in_force(self, schedule: int | None, steps: int | None) -> Tier:
        """The tier with a value for each setting that is drawn, all of them functions of the seed; given ones stay.

        schedule: number of timesteps of the models' noise schedule, steps: the task's number of sampling steps; None for models
        without them. Raises ValueError if the seed is not drawn yet.
        """
        if self.seed is None:
            raise ValueError("the tier has no seed: give one, or draw it first")
        values = {} if schedule is None else draws.values(self.seed, schedule, self.timesteps, self.injection_t)
        values = {name: value for name, value in values.items() if getattr(self, name) is None}
        if self.sampling_steps is None and steps is not None:
            values["sampling_steps"] = draws.sampling_steps(self.seed, steps, schedule or steps)
        elif self.sampling_steps == 0:
            values["sampling_steps"] = steps
        return self.model_copy(update=values)

    def sizes(self) -> dict[str, Any]:
        """The settings that evaluators read."""
        return self.model_dump(exclude={"seed", "checks", "groups", "strips"})


def _probe() -> Tier:
    """The probe's settings are all fixed: a search must be reproducible."""
    return Tier(
        seed=1,
        judge="probe",
        full_fidelity=False,
        sampling_steps=0,
        injection_t=600,
        injection_steps=12,
        membership_t=(20, 50, 100, 200, 300),
        membership_stride=10,
        recall_t=(100, 250, 400, 600, 800),
        likelihood_steps=20,
    )


def _audit() -> Tier:
    left_out = {*attacks(), *checks_by_weights(), *(n for n, check in EVALUATORS.items() if check.costly)}
    left_out.remove("relearning")  # a view of tasks about a class
    return Tier(
        judge="audit",
        checks=tuple(sorted(set(EVALUATORS) - left_out)),
        groups=20,
        samples=800,
        class_samples=200,
        noises=60,
        loss_noises=20,
        loss_images=10,
        strips=8,
    )


def _durability() -> Tier:
    return Tier(
        judge="audit",
        checks=tuple(name for name in attacks() if not EVALUATORS[name].costly),
        groups=10,
        class_samples=100,
        noises=40,
        relearn_steps=(5, 25),
        full_fidelity=False,
    )


class AuditConfig(Section):
    """The three tiers of checks, and how many candidates they measure."""

    probe: Tier = Field(default_factory=_probe, description="cheap checks of every candidate, which steer the search")
    audit: Tier = Field(default_factory=_audit, description="all checks, on candidates of the front, base and oracles")
    durability: Tier = Field(default_factory=_durability, description="attacks on the finalists, base and oracles")
    top: int = Field(
        8, ge=1, description="largest number of audited candidates; the best of each method is always audited"
    )
    rounds: int = Field(
        2,
        ge=1,
        le=50,
        description="largest number of audits, each on new seeds, of a candidate whose place on the front is uncertain, 1 to 50",
    )
    finalists: int = Field(
        3, ge=0, description="largest number of audited candidates that are attacked, the best first"
    )
    attack_draws: int = Field(
        4,
        ge=1,
        le=100,
        description="largest factor by which the samples and noises of `durability` are raised, on new seeds, to decide finalists "
        "whose verdict is undecided, 1 (never) to 100",
    )
    require: dict[str, str] = Field(
        default_factory=dict, description="requirements on the recommended model: check.metric -> '>= x' or '<= x'"
    )
    attempts: Annotated[int, ASIDE] = Field(
        3, ge=1, description="how often an audit is tried before it is recorded as failed"
    )
    timeout_s: Annotated[float, ASIDE] = Field(600, gt=0, description="seconds after which an audit counts as hung")

    def checks_for(self, task: HasObjectives) -> tuple[str, ...]:
        """The checks of all tiers on a task, each once."""
        return tuple(dict.fromkeys(n for t in (self.probe, self.audit, self.durability) for n in t.checks_for(task)))

    def draw(self, schedule: int | None, steps: int | None) -> Drawn:
        """Draws what the tiers audit and durability leave open (see `Tier.in_force` for the arguments); new values at each call."""
        drawn = {}
        for name in ("audit", "durability"):
            tier: Tier = getattr(self, name)
            seed = draws.fresh_seed() if tier.seed is None else tier.seed
            before, after = (
                t.model_dump(mode="json")
                for t in (tier, tier.model_copy(update={"seed": seed}).in_force(schedule, steps))
            )
            drawn[name] = {key: value for key, value in after.items() if value != before[key]}
        return drawn

    def with_drawn(self, drawn: Drawn) -> AuditConfig:
        """With what `draw` has drawn, as values or as JSON data."""
        tiers = {}
        for name, values in drawn.items():
            plain = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
            tiers[name] = getattr(self, name).model_copy(update=plain)
        return self.model_copy(update=tiers)

    def round(self, number: int) -> tuple[str, Tier]:
        """(name, tier) of a round of the audit, counted from 1; later rounds have new seeds and save no pictures.

        Their timesteps and numbers of steps are those in force, so that the values of all rounds can be averaged.
        """
        if number == 1:
            return "audit", self.audit
        seed = derive_seed("audit round", self.audit.seed, number)
        return f"audit-{number}", self.audit.model_copy(update={"seed": seed, "strips": 0})

    def repeat(self, needed: float | None) -> int | None:
        """The factor by which to raise the samples of attacks again, given the one that would decide a verdict; None for not at all."""
        return max(2, math.ceil(needed)) if needed is not None and needed <= self.attack_draws > 1 else None

    def more_draws(self, factor: int) -> tuple[str, Tier]:
        """(name, tier) of the attacks with `factor` times the samples and noises, on new seeds."""
        tier = self.durability
        more = {key: factor * getattr(tier, key) for key in ("class_samples", "noises")}
        seed = derive_seed("attacks again", tier.seed, factor)
        return "durability-2", tier.model_copy(update=more | {"seed": seed, "strips": 0})

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if self.probe.seed is None:
            raise ValueError("probe.seed: must be given, because a search must be reproducible")
        tiers = {"probe": self.probe, "audit": self.audit, "durability": self.durability}
        seeds = {f"{name}.seed": tier.seed for name, tier in tiers.items() if tier.seed is not None}
        if len(set(seeds.values())) < len(seeds):
            named = ", ".join(f"{key} {seed}" for key, seed in seeds.items())
            raise ValueError(f"{named} overlap: search, audit and attacks must differ")
        if self.probe.judge == self.audit.judge:
            raise ValueError(f"probe.judge and audit.judge are both {self.audit.judge!r}: search and audit must differ")
        return self
