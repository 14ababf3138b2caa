"""Names of methods, evaluators and tasks: literal tables, resolved lazily, open to other packages by entry points."""

from __future__ import annotations

import difflib
import importlib
import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, get_args

METHODS = {
    "bernoulli": "methods.bernoulli:Bernoulli",
    "erasediff": "methods.erasediff:EraseDiff",
    "erasediff_siss": "methods.erasediff_siss:EraseDiffSISS",
    "esd": "methods.esd:ESD",
    "finetune": "methods.finetune:Finetune",
    "graddiff": "methods.graddiff:GradDiff",
    "neggrad": "methods.neggrad:NegGrad",
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
}

EVALUATORS = {
    "alignment": "evaluators.recognition:Alignment",
    "classifier": "evaluators.classifier:Classifier",
    "clid": "evaluators.membership:CLiD",
    "clip_iqa": "evaluators.recognition:CLIPIQA",
    "contrast": "evaluators.contrast:Contrast",
    "copy_detection": "evaluators.memorisation:CopyDetection",
    "denoising": "evaluators.denoising:Denoising",
    "detection": "evaluators.recognition:Detection",
    "domains": "evaluators.domains:Domains",
    "fidelity": "evaluators.fidelity:Fidelity",
    "fidelity_clip": "evaluators.fidelity:CLIPFidelity",
    "fidelity_dino": "evaluators.fidelity:DINOFidelity",
    "fidelity_inception": "evaluators.fidelity:InceptionFidelity",
    "finetuning": "evaluators.durability:FineTuning",
    "generation": "evaluators.generation:Generation",
    "interpolation": "evaluators.durability:Interpolation",
    "inversion": "evaluators.durability:Inversion",
    "latent_noise": "evaluators.durability:LatentNoise",
    "likelihood": "evaluators.likelihood:Likelihood",
    "lira": "evaluators.membership:LiRA",
    "loss": "evaluators.membership:Loss",
    "neighbours": "evaluators.memorisation:Neighbours",
    "nudenet": "evaluators.recognition:NudeNet",
    "outside_classifier": "evaluators.recognition:OutsideClassifier",
    "partial_diffusion": "evaluators.durability:PartialDiffusion",
    "per_class": "evaluators.per_class:PerClass",
    "pia": "evaluators.membership:PIA",
    "pian": "evaluators.membership:PIAN",
    "quantile": "evaluators.membership:Quantile",
    "quantisation": "evaluators.durability:Quantisation",
    "questions": "evaluators.questions:Questions",
    "recall": "evaluators.memorisation:Recall",
    "reconstruction": "evaluators.reconstruction:Reconstruction",
    "relearning": "evaluators.durability:Relearning",
    "rmia": "evaluators.membership:RMIA",
    "sampler_removal": "evaluators.durability:SamplerRemoval",
    "secmi": "evaluators.membership:SecMI",
    "sima": "evaluators.membership:SimA",
    "weight_noise": "evaluators.durability:WeightNoise",
    "zero_shot": "evaluators.recognition:ZeroShot",
}

# Evaluators that attack the model; the others measure it as it is.
ATTACKS = (
    "relearning", "finetuning", "quantisation", "weight_noise", "latent_noise", "partial_diffusion", "inversion",
    "interpolation", "sampler_removal",
)  # fmt: skip

# Evaluators that the embedded sweeps leave out for their cost; any config may name them.
THOROUGH = ("clid", "likelihood", "nudenet", "pian", "quantile", "secmi")

# Evaluators that need a file from the user, and the key of a tier's `weights` that names it: naming it adds them.
BY_WEIGHTS = {
    "alignment": "clip",
    "clip_iqa": "clip",
    "copy_detection": "sscd",
    "detection": "detector",
    "fidelity_clip": "clip",
    "fidelity_dino": "dino",
    "fidelity_inception": "inception",
    "outside_classifier": "classifier",
    "zero_shot": "clip",
}

# Families of models that compare images with captions and draw nothing, as `methods.base` and `evaluators.base` have it, too.
CONTRASTIVE = frozenset({"clip", "vlm"})

TASKS = {
    "digits-class": "raysweep.tasks.digits:ClassTask",
    "digits-clip": "raysweep.tasks.digits:ClipTask",
    "digits-picture": "raysweep.tasks.digits:PictureTask",
    "digits-text": "raysweep.tasks.digits:TextTask",
    "images": "raysweep.tasks.images:ImagesTask",
}

_TABLES = {"method": METHODS, "evaluator": EVALUATORS, "task": TASKS}

# What an entry point of each kind must lead to a subclass of.
_BASES = {
    "method": "methods.base:Method",
    "evaluator": "evaluators.base:Evaluator",
    "task": "raysweep.tasks.base:TaskSettings",
}


class RegistryError(ValueError):
    """A name that does not lead to what it should; the message is for people."""


class UnknownName(RegistryError):
    """A name that no table holds; the message lists the nearest valid ones."""


class PluginError(RegistryError):
    """What another package offers under a name cannot be used; the message names the package and the fault."""


def external(kind: str) -> dict[str, tuple[EntryPoint, ...]]:
    """What installed packages add through the entry-point group `raysweep.<kind>s`, by name."""
    return _installed(kind, tuple(sys.path))


@cache
def _installed(kind: str, path: tuple[str, ...]) -> dict[str, tuple[EntryPoint, ...]]:
    """What `external` finds on one import path: validating a config asks a hundred times, and each search reads every package."""
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for point in entry_points(group=f"raysweep.{kind}s"):
        found[point.name] = (*found.get(point.name, ()), point)
    return found


def provider(point: EntryPoint) -> str:
    """The package that offers an entry point, with its version."""
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.module


def names(kind: str) -> list[str]:
    """All names of a kind ("method", "evaluator", "task"), sorted."""
    return sorted({**external(kind), **_TABLES[kind]})


def resolve(kind: str, name: str) -> Any:
    """Imports what `name` stands for; raises UnknownName with a suggestion, or PluginError."""
    target, points = _TABLES[kind].get(name), external(kind).get(name, ())
    if target is None and not points:
        raise UnknownName(f"{name!r} is not a known {kind}{suggest(name, names(kind))}")
    offered = [*(["raysweep"] if target else []), *map(provider, points)]
    if len(offered) > 1:
        raise PluginError(f"the {kind} {name!r} is offered by {' and by '.join(offered)}: uninstall one of them")
    if target is None:
        return _load(kind, name, points[0])
    return _attribute(target)


def _attribute(target: str) -> Any:
    module, attribute = target.split(":")
    return getattr(importlib.import_module(module), attribute)


def _load(kind: str, name: str, point: EntryPoint) -> Any:
    """Imports what another package offers, and checks that it is complete."""
    what = f"the {kind} {name!r} of the package {provider(point)} ({point.value})"
    try:
        found: Any = point.load()
    except Exception as error:  # a foreign module may raise anything
        raise PluginError(f"{what} cannot be imported: {type(error).__name__}: {error}") from error
    base: Any = _attribute(_BASES[kind])
    fits = isinstance(found, type) and issubclass(found, base)
    if not fits:
        raise PluginError(f"{what} is not a subclass of {base.__module__}.{base.__qualname__}")
    fields = getattr(found, "model_fields", {})
    given = fields["name"].default if "name" in fields else getattr(found, "name", None)
    if given != name:
        raise PluginError(f"{what} has the name {given!r}: the name of the entry point and of the class must be equal")
    lacking = sorted(getattr(found, "__abstractmethods__", ()))
    lacking += [a for a in base.__annotations__ if a not in base.__dict__ and a not in fields and not hasattr(found, a)]
    if kind == "task" and found.build is base.build:
        lacking.append("build")
    if lacking:
        raise PluginError(f"{what} lacks {', '.join(lacking)}")
    if kind == "evaluator" and found.reach is not None:
        reaches = get_args(importlib.import_module("evaluators.base").Reach)
        if found.reach not in reaches or "excess" not in found.directions:
            raise PluginError(
                f"{what} is an attack (its reach is {found.reach!r}): its reach must be one of {', '.join(reaches)}, and its "
                "directions must have the metric excess, which verdicts are made of"
            )
    return found


def module_of(kind: str, name: str) -> str:
    """The module that `name` stands for, without importing it; raises UnknownName."""
    if name in _TABLES[kind]:
        return _TABLES[kind][name].split(":")[0]
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
