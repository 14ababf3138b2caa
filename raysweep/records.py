"""Records of extensions: facts that are needed before their modules, and with these PyTorch, are imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ModelKind = Literal["diffusion", "contrastive"]
Condition = Literal["label", "caption"]
Reach = Literal["input", "weights", "base"]


@dataclass(frozen=True)
class Check:
    """Facts about an evaluator that configs need before its module, and with it torch, is imported.

    Args:
        target: "module:class" of the evaluator.
        reach: of an attack, what an attacker needs (see `evaluators.base.Evaluator`); None for a check that does not attack.
        costly: whether the default checks leave it out for its cost; any config may name it.
        weights: the key of a tier's `weights` under which the user names the file that it needs, which adds the check; None
            for a check that needs no file.
    """

    target: str
    reach: Reach | None = None
    costly: bool = False
    weights: str | None = None


@dataclass(frozen=True)
class Family:
    """A family of models: everything that differs between families, except the handle itself.

    Args:
        handle: "module:class" of the handle, a subclass of `raysweep.models.handle.Handle`. It is imported when a model of the
            family is: the libraries of the others would take every process of a run seconds to load.
        model_kind: "diffusion" for models that draw images, "contrastive" for models that compare images with captions.
        conditions: the kinds of conditions that its networks take.
        abilities: features of its models that not all models of their kind have: "answers" (to questions about images), "safe
            sampling" (guidance away from a concept), "retraining" (a model can be trained from scratch on the task's images),
            "cross-attention to prompts" (keys and values are linear in the prompts' embeddings), "feed-forward layers" (the network
            has transformer blocks with two linear layers each), "a trainable text encoder" (layers on word embeddings), "free
            steps" (the sampler is not bound to the steps of the training's noise schedule).
        library: the library that reads its folders, as model hubs name it.
        loading: the line of Python that reads a folder, written as FOLDER. {NAME} is replaced by the class of the part
            NAME in the folder's model_index.json.
        pipelines: names of the diffusers pipelines whose folders hold such a model.
        marks: files by which its other folders are recognised, and what these JSON files must say ({}: nothing in particular).
        null_labels: whether every class-conditional model of it has a class index for "no class"; models without one are then
            unconditional.
    """

    handle: str
    model_kind: ModelKind
    conditions: frozenset[Condition]
    abilities: frozenset[str]
    library: str
    loading: str
    pipelines: tuple[str, ...] = ()
    marks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    null_labels: bool = False

    @property
    def text_to_image(self) -> bool:
        """Whether its models draw images from captions."""
        return self.model_kind == "diffusion" and "caption" in self.conditions
