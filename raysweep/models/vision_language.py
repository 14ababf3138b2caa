"""Vision-language models like LLaVA: a CLIP vision tower whose patches a language model reads.

A folder holds the model as transformers saves it (`LlavaForConditionalGeneration`, `LlavaProcessor`) and, in `clip`, the whole CLIP
model of its tower (`CLIPModel` with tokenizer and image processor). Methods see that CLIP model. Only its vision tower may change,
and of that only the layers that the language model reads: LLaVA takes the output of the last but one. Both models share the tower,
so a change reaches the language model, and only edited tensors differ in the saved folder.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer, LlavaForConditionalGeneration, LlavaProcessor

from raysweep.models import weights
from raysweep.models.configuration import (
    generation_settings,
    network_settings,
    plain,
    processor_settings,
    tokenizer_settings,
)
from raysweep.models.folders import NETWORK, PROCESSOR, TOKENIZER, component_files, no_progress_bars, read_json, reading
from raysweep.models.handle import Handle
from raysweep.models.unet import draw_weights
from raysweep.storage.files import digest_of, digest_state

GENERATION = "generation_config.json"
CLIP = "clip"  # the subfolder of the whole CLIP model
PROMPT = "USER: <image>\n{question} ASSISTANT:"  # of LLaVA 1.5
QUESTION = "Who is in this picture?"
MAX_ANSWER = 12  # tokens of an answer
ROWS = 8  # questions per forward pass


@dataclass(frozen=True)
class Around:
    """The parts that never change. vlm: the language model with its projector; processor: its preprocessing; tokenizer, images:
    those of the CLIP model; digest: hash of the weights outside the tower."""

    vlm: Any
    processor: Any
    tokenizer: Any
    images: Any
    digest: str


class VisionLanguage(Handle):
    """A LLaVA-type model, seen through the CLIP model of its vision tower.

    Args:
        net: transformers' `CLIPModel`.
        around: the other parts.
    """

    family = "vlm"
    reads: ClassVar[tuple[str, ...]] = (
        *NETWORK,
        *TOKENIZER,
        *PROCESSOR,
        GENERATION,
        *(f"{CLIP}/{name}" for name in (*NETWORK, *TOKENIZER, *PROCESSOR)),
    )

    def __init__(self, net: Any, around: Around):
        self.net, self.around = net, around
        layers = net.config.vision_config.num_hidden_layers + 1 + around.vlm.config.vision_feature_layer
        for name, p in net.named_parameters():
            p.requires_grad_(name.startswith("vision_model") and _is_read(name, layers))
        self.mean, self.std = (
            torch.tensor(getattr(around.images, k)).view(1, 3, 1, 1) for k in ("image_mean", "image_std")
        )

    @classmethod
    def load(cls, folder: str | Path) -> VisionLanguage:
        """Reads a folder, safetensors only; raises ValueError, saying what is wrong with it."""
        folder = Path(folder)
        if not (folder / CLIP / "config.json").is_file():
            raise ValueError(f"{folder / CLIP}: missing: it must hold the CLIP model that the vision tower is of")
        component_files(folder, ("tokenizer.json", "tokenizer.model"))
        component_files(folder / CLIP, ("tokenizer.json", "vocab.json"))
        if (folder / GENERATION).is_file():
            read_json(folder / GENERATION)  # the library would ignore a damaged one
        vlm: Any = weights.read(LlavaForConditionalGeneration, folder, dtype="auto")
        net: Any = weights.read(CLIPModel, folder / CLIP, dtype=torch.float32)
        with reading(folder):
            processor = LlavaProcessor.from_pretrained(folder, local_files_only=True)
        with reading(folder / CLIP):
            tokenizer = CLIPTokenizer.from_pretrained(folder / CLIP, local_files_only=True)
            images = CLIPImageProcessor.from_pretrained(folder / CLIP, local_files_only=True)
        _check_scale(folder, processor.image_processor)
        _check_scale(folder / CLIP, images)
        _check_vocabulary(folder, processor.tokenizer, vlm.get_input_embeddings().num_embeddings)
        _check_vocabulary(folder / CLIP, tokenizer, net.config.text_config.vocab_size)
        _check_tower(folder / CLIP, vlm.model.vision_tower.state_dict(), net.vision_model.state_dict())
        rest = {n: t for n, t in vlm.state_dict().items() if "vision_tower" not in n}
        vlm.eval().requires_grad_(False)
        return cls(net.eval(), Around(vlm, processor, tokenizer, images, digest_state(rest)))

    def save(self, folder: str | Path) -> None:
        """Writes a folder that `LlavaForConditionalGeneration.from_pretrained` reads, with the CLIP model beside it."""
        around, folder = self.around, Path(folder)
        with no_progress_bars():
            self.whole().save_pretrained(folder)
            around.processor.save_pretrained(folder)
            for part in (self.net, around.tokenizer, around.images):
                part.save_pretrained(folder / CLIP)

    def whole(self) -> Any:
        """The language model with this vision tower."""
        vlm, tower = self.around.vlm, self.net.vision_model
        vlm.model.vision_tower = tower if self.dtype == vlm.dtype else copy.deepcopy(tower).to(vlm.dtype)
        return vlm

    def placed(self) -> Any:
        """The language model with this vision tower, on the network's device, or spread over all GPUs that this process sees."""
        vlm = self.around.vlm
        if getattr(vlm, "hf_device_map", None) is None:
            if self.device.type == "cuda" and torch.cuda.device_count() > 1:
                self.spread()
            else:
                vlm.to(self.device)
        return self.whole().eval()

    def spread(self, devices: dict[str, Any] | None = None) -> None:
        """Puts the parts of the language model on several devices, once for all handles that share it.

        devices: module -> device; None: by size over all GPUs. Raises ValueError if accelerate is not installed.
        """
        try:
            from accelerate import dispatch_model, infer_auto_device_map
        except ImportError as error:
            raise ValueError("a model on several devices needs: pip install 'raysweep[large]'") from error
        vlm = self.around.vlm
        vlm.model.vision_tower = copy.deepcopy(self.net.vision_model)  # candidates' towers are swapped in without hooks
        if devices is None:
            devices = infer_auto_device_map(vlm, no_split_module_classes=vlm._no_split_modules)
        dispatch_model(vlm, devices, force_hooks=True)

    def with_net(self, net: Any) -> VisionLanguage:
        """Another CLIP model of the same architecture."""
        return type(self)(net, self.around)

    def fresh(self, seed: int) -> VisionLanguage:
        """The same language model with a newly drawn CLIP model."""
        return self.with_net(draw_weights(lambda: CLIPModel(self.net.config), seed).to(self.dtype))

    def to(self, device: torch.device) -> VisionLanguage:
        """Moves the CLIP model; the language model follows in `answers`."""
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return super().to(device)

    @property
    def digest(self) -> str:
        return digest_of(super().digest, self.around.digest)

    @property
    def settings(self) -> dict[str, Any]:
        """Plain data: the settings of both networks, of tokenizers and image processors, and of generation."""
        around = self.around
        return {
            **super().settings,
            "language": network_settings(around.vlm),
            "generation": generation_settings(around.vlm),
            "processor": processor_settings(around.processor),
            "tokenizers": [tokenizer_settings(t) for t in (around.processor.tokenizer, around.tokenizer)],
            "images": plain([around.images.image_mean, around.images.image_std]),
        }

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        size = self.net.config.vision_config.image_size
        return 3, size, size

    @property
    def logit_scale(self) -> torch.Tensor:
        """Factor of the cosines before the softmax, a scalar."""
        return self.net.logit_scale.exp()

    def encode_image(self, x: torch.Tensor) -> torch.Tensor:
        """Embeddings (n, d), not normalised, of images (n, 3, H, W) in [-1, 1]."""
        pixels = ((x + 1) / 2 - self.mean.to(x)) / self.std.to(x)
        return self.net.visual_projection(self.net.vision_model(pixel_values=pixels).pooler_output)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings (n, d), not normalised, of captions."""
        return self.net.text_projection(self.net.text_model(input_ids=tokens).pooler_output)

    def unconditional(self, count: int) -> None:
        """None: there is no branch without a caption."""

    def tokens(self, captions: list[str]) -> torch.Tensor:
        """The tokens of captions, (n, L)."""
        length = self.net.config.text_config.max_position_embeddings
        return self.around.tokenizer(
            captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids

    @torch.no_grad()
    def answers(self, x: torch.Tensor, question: str) -> list[str]:
        """The language model's answers to the question about each image (n, 3, H, W) in [-1, 1], decoded greedily."""
        vlm, processor, answers = self.placed(), self.around.processor, list[str]()
        for part in x.split(ROWS):
            pixels = ((part + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
            text = [PROMPT.format(question=question)] * len(part)
            batch = processor(images=[Image.fromarray(p) for p in pixels], text=text, return_tensors="pt", padding=True)
            inputs = {
                k: v.to(vlm.device, vlm.dtype) if v.is_floating_point() else v.to(vlm.device) for k, v in batch.items()
            }
            out = vlm.generate(**inputs, max_new_tokens=MAX_ANSWER, do_sample=False)
            answers += processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [answer.strip() for answer in answers]


def _check_scale(folder: Path, images: Any) -> None:
    """Raises ValueError unless an image processor shifts and scales three channels by finite numbers, the scales above 0."""
    for key in ("image_mean", "image_std"):
        values: Any = getattr(images, key, None)
        numbers = isinstance(values, list | tuple) and all(type(v) in (int, float) and math.isfinite(v) for v in values)
        if not numbers or len(values) != 3 or (key == "image_std" and min(values) <= 0):
            above = " above 0" if key == "image_std" else ""
            raise ValueError(
                f"{folder / 'preprocessor_config.json'}: {key}: {values!r} must be three finite numbers{above}"
            )


def _check_vocabulary(folder: Path, tokenizer: Any, known: int) -> None:
    """Raises ValueError if a tokenizer has more tokens than the model has embeddings."""
    if len(tokenizer) > known:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, but the model knows {known}: they are not of the same model"
        )


def _check_tower(folder: Path, tower: dict[str, torch.Tensor], clip: dict[str, torch.Tensor]) -> None:
    """Raises ValueError unless the tensors of a vision tower are those of its CLIP model, rounded to the tower's type."""
    differing = [n for n, t in tower.items() if n not in clip or not torch.equal(clip[n].to(t.dtype), t)]
    if differing:
        raise ValueError(
            f"{folder}: is not the CLIP model of this vision tower: {len(differing)} of {len(tower)} tensors differ, "
            f"among them {differing[0]}"
        )


def _is_read(name: str, layers: int) -> bool:
    """Whether a parameter of the tower affects the language model, which reads the output of so many layers."""
    if "encoder.layers." in name:
        return int(name.split("encoder.layers.")[1].split(".")[0]) < layers
    return "post_layernorm" not in name
