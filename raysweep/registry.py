"""Names of methods, evaluators, model families, tasks and samplers: literal tables, resolved lazily, open to other packages."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, get_args

from raysweep.records import Check, Family, ModelKind, Reach

METHODS = {
    "advunlearn": "methods.advunlearn:AdvUnlearn",
    "bernoulli": "methods.bernoulli:Bernoulli",
    "concept_ablation": "methods.concept_ablation:ConceptAblation",
    "conceptprune": "methods.conceptprune:ConceptPrune",
    "erasediff": "methods.erasediff:EraseDiff",
    "erasediff_siss": "methods.erasediff_siss:EraseDiffSISS",
    "esd": "methods.esd:ESD",
    "finetune": "methods.finetune:Finetune",
    "graddiff": "methods.graddiff:GradDiff",
    "munba": "methods.munba:MUNBa",
    "neggrad": "methods.neggrad:NegGrad",
    "rece": "methods.rece:RECE",
    "retrain": "methods.retrain:Retrain",
    "rg": "methods.rg:RG",
    "rgd": "methods.rgd:RGD",
    "salun": "methods.salun:SalUn",
    "selective_amnesia": "methods.selective_amnesia:SelectiveAmnesia",
    "sfd": "methods.sfd:SFD",
    "sfd_two_stage": "methods.sfd_two_stage:SFDTwoStage",
    "siss": "methods.siss:SISS",
    "siss_no_is": "methods.siss_no_is:SISSNoIS",
    "sld": "methods.sld:SLD",
    "slug": "methods.slug:SLUG",
    "speed": "methods.speed:SPEED",
    "ssd": "methods.ssd:SSD",
    "uce": "methods.uce:UCE",
}

EVALUATORS = {
    "alignment": Check("evaluators.recognition:Alignment", weights="clip"),
    "altered": Check("evaluators.altered:Altered"),
    "classifier": Check("evaluators.classifier:Classifier"),
    "clid": Check("evaluators.membership:CLiD", costly=True),
    "clip_iqa": Check("evaluators.recognition:CLIPIQA", weights="clip"),
    "contrast": Check("evaluators.contrast:Contrast"),
    "copy_detection": Check("evaluators.memorisation:CopyDetection", weights="sscd"),
    "denoising": Check("evaluators.denoising:Denoising"),
    "detection": Check("evaluators.recognition:Detection", weights="detector"),
    "domains": Check("evaluators.domains:Domains"),
    "fidelity": Check("evaluators.fidelity:Fidelity"),
    "fidelity_clip": Check("evaluators.fidelity:CLIPFidelity", weights="clip"),
    "fidelity_dino": Check("evaluators.fidelity:DINOFidelity", weights="dino"),
    "fidelity_inception": Check("evaluators.fidelity:InceptionFidelity", weights="inception"),
    "generation": Check("evaluators.generation:Generation"),
    "likelihood": Check("evaluators.likelihood:Likelihood", costly=True),
    "lira": Check("evaluators.membership:LiRA"),
    "loss": Check("evaluators.membership:Loss"),
    "neighbours": Check("evaluators.memorisation:Neighbours"),
    "nudenet": Check("evaluators.recognition:NudeNet", costly=True),
    "outside_classifier": Check("evaluators.recognition:OutsideClassifier", weights="classifier"),
    "per_class": Check("evaluators.per_class:PerClass"),
    "pia": Check("evaluators.membership:PIA"),
    "pian": Check("evaluators.membership:PIAN", costly=True),
    "published": Check("evaluators.published:Published"),
    "quantile": Check("evaluators.membership:Quantile", costly=True),
    "questions": Check("evaluators.questions:Questions"),
    "recall": Check("evaluators.memorisation:Recall"),
    "reconstruction": Check("evaluators.reconstruction:Reconstruction"),
    "rmia": Check("evaluators.membership:RMIA"),
    "secmi": Check("evaluators.membership:SecMI", costly=True),
    "sima": Check("evaluators.membership:SimA"),
    "zero_shot": Check("evaluators.recognition:ZeroShot", weights="clip"),
    # attacks, in the order in which they are made and shown
    "relearning": Check("evaluators.durability:Relearning", reach="weights"),
    "finetuning": Check("evaluators.durability:FineTuning", reach="weights"),
    "quantisation": Check("evaluators.durability:Quantisation", reach="weights"),
    "weight_noise": Check("evaluators.durability:WeightNoise", reach="weights"),
    "latent_noise": Check("evaluators.durability:LatentNoise", reach="input"),
    "partial_diffusion": Check("evaluators.durability:PartialDiffusion", reach="input"),
    "inversion": Check("evaluators.durability:Inversion", reach="input"),
    "inpainting": Check("evaluators.inpainting:Inpainting", reach="input", costly=True),
    "unlearndiffatk": Check("evaluators.prompts:UnlearnDiffAtk", reach="input", costly=True),
    "ring_a_bell": Check("evaluators.prompts:RingABell", reach="input", costly=True),
    "interpolation": Check("evaluators.durability:Interpolation", reach="base"),
    "sampler_removal": Check("evaluators.durability:SamplerRemoval", reach="input"),
}

FAMILIES = {
    "clip": Family(
        handle="raysweep.models.clip:Contrastive",
        model_kind="contrastive",
        conditions=frozenset({"caption"}),
        abilities=frozenset({"retraining"}),
        library="open_clip",
        loading='open_clip.create_model_from_pretrained("local-dir:FOLDER")',
        marks={"open_clip_config.json": {}},
    ),
    "edm": Family(
        handle="raysweep.models.edm:EDM",
        model_kind="diffusion",
        conditions=frozenset({"label"}),
        abilities=frozenset({"retraining", "free steps"}),
        library="diffusers",
        loading='{unet}.from_pretrained(FOLDER, subfolder="unet")',
        pipelines=("EDMPipeline",),
    ),
    "flow": Family(
        handle="raysweep.models.flow:Flow",
        model_kind="diffusion",
        conditions=frozenset({"caption"}),
        abilities=frozenset({"retraining", "free steps"}),
        library="diffusers",
        loading="diffusers.DiffusionPipeline.from_pretrained(FOLDER)",
        pipelines=("StableDiffusion3Pipeline",),
    ),
    "pixel-ddpm": Family(
        handle="raysweep.models.pixel:PixelDDPM",
        model_kind="diffusion",
        conditions=frozenset({"label"}),
        abilities=frozenset({"retraining", "safe sampling"}),
        library="diffusers",
        loading="diffusers.DDIMPipeline.from_pretrained(FOLDER)",
        pipelines=("DDIMPipeline", "DDPMPipeline"),
        null_labels=True,
    ),
    "text-ddpm": Family(
        handle="raysweep.models.latent:LatentText",
        model_kind="diffusion",
        conditions=frozenset({"caption"}),
        abilities=frozenset(
            {
                "a trainable text encoder",
                "cross-attention to prompts",
                "feed-forward layers",
                "retraining",
                "safe sampling",
            }
        ),
        library="diffusers",
        loading="diffusers.DiffusionPipeline.from_pretrained(FOLDER)",
        pipelines=("StableDiffusionPipeline", "StableDiffusionXLPipeline"),
    ),
    "vlm": Family(
        handle="raysweep.models.vision_language:VisionLanguage",
        model_kind="contrastive",
        conditions=frozenset({"caption"}),
        abilities=frozenset({"answers"}),  # not "retraining": the language model would stay as it is
        library="transformers",
        loading="transformers.LlavaForConditionalGeneration.from_pretrained(FOLDER)",
        marks={"config.json": {"model_type": "llava"}},
    ),
}

SAMPLERS = {
    "random": "raysweep.search.samplers:random",
    "tpe": "raysweep.search.samplers:tpe",
}

TASKS = {
    "digits-class": "raysweep.tasks.digits:ClassTask",
    "digits-clip": "raysweep.tasks.digits:ClipTask",
    "digits-picture": "raysweep.tasks.digits:PictureTask",
    "digits-text": "raysweep.tasks.digits:TextTask",
    "images": "raysweep.tasks.images:ImagesTask",
}

_TABLES: dict[str, Mapping[str, str | Check | Family]] = {
    "method": METHODS,
    "evaluator": EVALUATORS,
    "family": FAMILIES,
    "task": TASKS,
    "sampler": SAMPLERS,
    "section": {},
}
# The entry point groups by which other packages offer each kind.
_GROUPS = {
    "method": "raysweep.methods",
    "evaluator": "raysweep.evaluators",
    "family": "raysweep.families",
    "task": "raysweep.tasks",
    "sampler": "raysweep.samplers",
    "section": "raysweep.sections",
}
# The classes that offered methods, evaluators and tasks must derive from.
_BASES = {
    "method": "methods.base:Method",
    "evaluator": "evaluators.base:Evaluator",
    "task": "raysweep.tasks.base:TaskSettings",
}
# Class attributes that raysweep used to read, and what took their places.
_RENAMED = {
    "families": "model_kinds ('diffusion', 'contrastive'), and abilities for what only some of these models offer"
}


class RegistryError(ValueError):
    """A name that cannot be resolved."""


class UnknownName(RegistryError):
    """A name that no table holds; the message suggests the nearest valid one and lists all."""


class PluginError(RegistryError):
    """An extension of another package that cannot be used; the message names the package and the fault."""


def external(kind: str) -> dict[str, tuple[EntryPoint, ...]]:
    """Entry points by which installed packages add extensions of a kind, by name."""
    return _installed(_GROUPS[kind], tuple(sys.path))


@cache
def _installed(group: str, path: tuple[str, ...]) -> dict[str, tuple[EntryPoint, ...]]:
    """Entry points of a group on one import path, kept: validating a config asks a hundred times, and each search reads every
    package."""
    points: dict[str, tuple[EntryPoint, ...]] = {}
    for point in entry_points(group=group):
        points[point.name] = (*points.get(point.name, ()), point)
    return points


def provider(point: EntryPoint) -> str:
    """The package that offers an entry point, with its version."""
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.module


def names(kind: str) -> list[str]:
    """All names of a kind ("method", "evaluator", "family", "task", "sampler", "section"), sorted."""
    return sorted({**external(kind), **_TABLES[kind]})


def resolve(kind: str, name: str) -> Any:
    """The class, record (of a family) or function (sampler, section) of that name; raises UnknownName with a suggestion, or
    PluginError."""
    entry, points = _TABLES[kind].get(name), external(kind).get(name, ())
    if entry is None and not points:
        raise UnknownName(f"{name!r} is not a known {kind}{suggest(name, names(kind))}")
    providers = [*(["raysweep"] if entry else []), *map(provider, points)]
    if len(providers) > 1:
        raise PluginError(f"the {kind} {name!r} is offered by {' and by '.join(providers)}: uninstall one of them")
    if entry is None:
        return _load(kind, name, points[0])
    return entry if isinstance(entry, Family) else imported(_target(entry))


def imported(target: str) -> Any:
    """The attribute of a module that "module:attribute" names."""
    module, attribute = target.split(":")
    return getattr(importlib.import_module(module), attribute)


def attacks() -> tuple[str, ...]:
    """The attacks that come with raysweep, in the order in which they are made and shown."""
    return tuple(name for name, check in EVALUATORS.items() if check.reach is not None)


def checks_by_weights() -> dict[str, str]:
    """The checks that come with raysweep and need a file from the user, with the key of a tier's `weights` that names it."""
    return {name: check.weights for name, check in EVALUATORS.items() if check.weights is not None}


def reach_of(evaluator: str) -> Reach | None:
    """The access that an attacker needs for an evaluator's attack; None if it is not an attack."""
    check = EVALUATORS.get(evaluator)
    reach: Reach | None = resolve("evaluator", evaluator).reach if check is None else check.reach
    return reach


def unserved(extension: Any, family: str) -> list[str]:
    """Why a method or an evaluator (its class) cannot work on models of a family; [] if it can."""
    record: Family = resolve("family", family)
    if record.model_kind not in extension.model_kinds:
        kinds = " or ".join(sorted(extension.model_kinds))
        return [f"it works on {kinds} models, and the task's is {family}, a {record.model_kind} model"]
    lacking = sorted(extension.abilities - record.abilities)
    return [f"it needs a model that offers {ability}, and {family} models do not" for ability in lacking]


def _target(entry: str | Check | Family) -> str:
    if isinstance(entry, Check):
        return entry.target
    return entry.handle if isinstance(entry, Family) else entry


def _load(kind: str, name: str, point: EntryPoint) -> Any:
    """Imports what another package offers, and checks that it is complete."""
    label = f"the {kind} {name!r} of the package {provider(point)} ({point.value})"
    try:
        offered: Any = point.load()
    except Exception as error:  # a foreign module may raise anything
        raise PluginError(f"{label} cannot be imported: {type(error).__name__}: {error}") from error
    if kind == "family":
        fault = _fault_of_family(offered)
    elif kind in _BASES:
        fault = _fault_of_class(kind, name, offered)
    else:
        fault = "" if callable(offered) else "is not a function"
    if fault:
        raise PluginError(f"{label} {fault}")
    return offered


def _fault_of_family(record: Any) -> str:
    """Why an object cannot be used as the record of a family; "" if it can."""
    if not isinstance(record, Family):
        return f"is not an instance of {Family.__module__}.{Family.__qualname__}"
    if record.model_kind not in get_args(ModelKind):
        return f"has the model_kind {record.model_kind!r}; valid: {', '.join(get_args(ModelKind))}"
    if not record.pipelines and not record.marks:
        return "has neither pipelines nor marks, so that no folder would be recognised"
    return ""


def _fault_of_class(kind: str, name: str, offered: Any) -> str:
    """Why an object cannot be used as the class of a method, an evaluator or a task; "" if it can."""
    base: Any = imported(_BASES[kind])
    is_subclass = isinstance(offered, type) and issubclass(offered, base)
    if not is_subclass:
        return f"is not a subclass of {base.__module__}.{base.__qualname__}"
    fields = getattr(offered, "model_fields", {})
    stated = fields["name"].default if "name" in fields else getattr(offered, "name", None)
    if stated != name:
        return f"has the name {stated!r}: the name of the entry point and of the class must be equal"
    lacking = sorted(getattr(offered, "__abstractmethods__", ()))
    lacking += [
        a for a in base.__annotations__ if a not in base.__dict__ and a not in fields and not hasattr(offered, a)
    ]
    if kind == "task" and getattr(offered, "build", None) is base.build:
        lacking.append("build")
    if lacking:
        return f"lacks {', '.join(lacking)}"
    if kind == "task":
        return ""
    return _fault_of_model_kinds(offered) or (_fault_of_attack(offered) if kind == "evaluator" else "")


def _fault_of_model_kinds(offered: Any) -> str:
    """Why the models that a method or an evaluator says it works on make no sense; "" if they do."""
    for old, new in _RENAMED.items():
        if hasattr(offered, old):
            return f"sets {old}, which is no longer read: state {new}"
    unknown = sorted(set(offered.model_kinds) - set(get_args(ModelKind)))
    return f"has the model_kinds {unknown}; valid: {', '.join(get_args(ModelKind))}" if unknown else ""


def _fault_of_attack(offered: Any) -> str:
    """Why the reach of an evaluator makes no sense; "" if it does."""
    if issubclass(offered, imported("evaluators.durability:Durability")) and offered.reach is None:
        return "is an attack and lacks reach"
    if offered.reach is not None and (offered.reach not in get_args(Reach) or "excess" not in offered.directions):
        return (
            f"is an attack (its reach is {offered.reach!r}): its reach must be one of {', '.join(get_args(Reach))}, and its "
            "directions must have the metric excess, which verdicts are made of"
        )
    return ""


def module_of(kind: str, name: str) -> str:
    """The module of the extension `name`, which is not imported; raises UnknownName."""
    if name in _TABLES[kind]:
        return _target(_TABLES[kind][name]).split(":")[0]
    if name not in external(kind):
        raise UnknownName(f"{name!r} is not a known {kind}{suggest(name, names(kind))}")
    return external(kind)[name][0].module


def method_names() -> list[str]:
    """Searchable methods that come with raysweep."""
    return sorted(set(METHODS) - {"retrain"})


def suggest(name: str, valid: list[str]) -> str:
    """ "; did you mean 'x'? valid: ..." for an error message."""
    close = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{hint} valid: {', '.join(valid)}"
