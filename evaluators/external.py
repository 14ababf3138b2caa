"""Networks that users bring as files: CLIP, DINO, Inception, an image classifier, a detector, SSCD. Loaded once per process.

A tier's `weights` name the file or folder of each. Nothing is downloaded, and pickled code is never run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from evaluators.base import Inapplicable, Subject
from evaluators.batches import Batches

MESSAGE_LENGTH = 400  # characters shown of a library's message
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Unreadable(ValueError):
    """A file of weights cannot be used; the message names it and what it should be."""


def network(subject: Subject, key: str, kind: Callable[[Path, str], Any]) -> Any:
    """`kind(path, device)` for the file or folder under `key` of the tier's weights, from memory if it has not changed.

    Raises Inapplicable if the weights are not configured or missing, and Unreadable if they cannot be used.
    """
    path = subject.sizes.get("weights", {}).get(key)
    if path is None:
        raise Inapplicable(f"weights.{key} is not set")
    path = Path(path)
    if not path.exists():
        raise Inapplicable(f"weights.{key}: {path} does not exist")
    return _loaded(kind, path, path.stat().st_mtime_ns, str(subject.model.device))


@lru_cache(maxsize=8)
def _loaded(kind: Callable[[Path, str], Any], path: Path, changed: int, device: str) -> Any:
    try:
        loaded = kind(path, device)
        net = getattr(loaded, "net", None)
        parameters = net.named_parameters() if isinstance(net, nn.Module) else ()
        infinite = [name for name, tensor in parameters if not bool(tensor.isfinite().all())]
        if infinite:
            raise ValueError(f"{len(infinite)} of its tensors hold numbers that are not finite ({infinite[0]})")
        return loaded
    except Exception as error:  # a foreign or truncated file surfaces as many different exceptions
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = " ".join(lines)
        shown = reason if len(reason) <= MESSAGE_LENGTH else f"{reason[:MESSAGE_LENGTH]}..."
        raise Unreadable(f"{path}: cannot be read as {kind.__name__}: {shown}") from error


def check(key: str, path: Path) -> None:
    """Raises Unreadable unless the file or folder under `key` of a tier's `weights` can be read; keeps nothing in memory."""
    _loaded.__wrapped__(KINDS[key], path, 0, "cpu")


def _pretrained(auto: Any, path: Path) -> tuple[Any, set[str]]:
    """(network, names of tensors missing from its files), from safetensors alone.

    Raises ValueError for tensors of other shapes than the network's.
    """
    net, info = auto.from_pretrained(
        path, local_files_only=True, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
    )
    if info["mismatched_keys"]:
        name, held, needed = min(info["mismatched_keys"])
        raise ValueError(f"its tensor {name} is {tuple(held)}, and the network's {tuple(needed)}")
    return net, set(info["missing_keys"])


def _complete(auto: Any, path: Path) -> Any:
    """The network; raises ValueError if tensors are missing, which the library would fill with random numbers."""
    net, missing = _pretrained(auto, path)
    if missing:
        raise ValueError(f"{len(missing)} of its tensors are missing ({', '.join(sorted(missing)[:3])})")
    return net


def rgb(images: torch.Tensor, size: int | tuple[int, int] | None = None) -> torch.Tensor:
    """Images (n, 3, H, W) in [0, 1], resized to `size`, from images (n, 1 or 3, H, W) in [-1, 1]."""
    x = ((images.float() + 1) / 2).clamp(0, 1)
    if x.shape[1] == 1:
        x = x.expand(-1, 3, -1, -1)
    if size is not None:
        size = (size, size) if isinstance(size, int) else size
        x = F.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return x


class _Network(ABC):
    """A network from images (n, C, H, W) in [-1, 1] to features or logits, float64 (n, d)."""

    def __init__(self, device: str):
        self.device = torch.device(device)

    @abstractmethod
    def one(self, x: torch.Tensor) -> torch.Tensor:
        """The output for one batch, on the network's device."""

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, batches: Batches | None = None) -> np.ndarray:
        """The output for all images; `batches` sets the rows at once."""

        def part(rows: slice) -> torch.Tensor:
            return self.one(images[rows].to(self.device)).double().cpu()

        return torch.cat((batches or Batches()).map(part, len(images))).numpy()


def _normalised(x: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    return (x - x.new_tensor(mean).view(1, 3, 1, 1)) / x.new_tensor(std).view(1, 3, 1, 1)


class SSCD(_Network):
    """Copy descriptors of unit length, from the authors' TorchScript file; 320 x 320, ImageNet statistics."""

    SIZE = 320

    def __init__(self, path: Path, device: str):
        super().__init__(device)
        self.net = torch.jit.load(str(path), map_location=self.device).eval()

    def one(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.net(_normalised(rgb(x, self.SIZE), *IMAGENET)), dim=1)


class CLIP(_Network):
    """An open_clip folder: `open_clip_config.json` and weights, as its `save_pretrained` and the hub lay them out."""

    def __init__(self, path: Path, device: str):
        import open_clip

        super().__init__(device)
        name = f"local-dir:{path}"
        # only size and statistics of the folder's preprocessing are used: the rest is for PIL images
        self.net = open_clip.create_model(name, device=device, load_weights=True).eval()
        self.tokenizer = open_clip.get_tokenizer(name)
        self.preprocessing = open_clip.get_model_preprocess_cfg(self.net)

    def one(self, x: torch.Tensor) -> torch.Tensor:
        pixels = rgb(x, self.preprocessing["size"])
        return self.net.encode_image(_normalised(pixels, self.preprocessing["mean"], self.preprocessing["std"]), True)

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> np.ndarray:
        """Text embeddings of unit length, float64 (n, d)."""
        return self.net.encode_text(self.tokenizer(list(prompts)).to(self.device), True).double().cpu().numpy()

    def classes(self, names: Sequence[str]) -> np.ndarray:
        """One unit vector per class name (classes, d), the mean over OpenAI's ImageNet templates as in CLIP's paper."""
        import open_clip

        templates = open_clip.OPENAI_IMAGENET_TEMPLATES
        vectors = open_clip.build_zero_shot_classifier(self.net, self.tokenizer, names, templates, device=self.device)
        return vectors.T.double().cpu().numpy()


class DINO(_Network):
    """A folder of a self-supervised vision transformer for transformers' `AutoModel`; gives the pooled or class token."""

    def __init__(self, path: Path, device: str):
        from transformers import AutoImageProcessor, AutoModel

        super().__init__(device)
        processor = AutoImageProcessor.from_pretrained(path, local_files_only=True)
        self.mean, self.std = processor.image_mean, processor.image_std
        net, missing = _pretrained(AutoModel, path)
        # DINO's first release has no pooler; the library would give it random weights
        self.pools = not missing
        if any(not name.startswith("pooler.") for name in missing):
            raise ValueError(f"{len(missing)} of its tensors are missing ({', '.join(sorted(missing)[:3])})")
        self.net = net.to(device).eval()
        self.size = _size(processor)

    def one(self, x: torch.Tensor) -> torch.Tensor:
        output = self.net(pixel_values=_normalised(rgb(x, self.size), self.mean, self.std))
        pooled = getattr(output, "pooler_output", None)
        return output.last_hidden_state[:, 0] if pooled is None or not self.pools else pooled


class ImageClassifier(_Network):
    """A folder of an image classifier for transformers' `AutoModelForImageClassification`; gives logits."""

    def __init__(self, path: Path, device: str):
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        super().__init__(device)
        processor = AutoImageProcessor.from_pretrained(path, local_files_only=True)
        self.mean, self.std, self.size = processor.image_mean, processor.image_std, _size(processor)
        net = _complete(AutoModelForImageClassification, path)
        self.net = net.to(device).eval()
        self.labels = {str(name).lower(): int(k) for k, name in net.config.id2label.items()}

    def one(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(pixel_values=_normalised(rgb(x, self.size), self.mean, self.std)).logits

    def columns(self, names: Sequence[str]) -> list[int]:
        """The columns of the logits for class names; raises Unreadable for a name that the classifier does not know."""
        missing = [n for n in names if n.lower() not in self.labels]
        if missing:
            known = ", ".join(list(self.labels)[:20])
            raise Unreadable(f"the classifier has no label {missing[0]!r}; its labels: {known}")
        return [self.labels[n.lower()] for n in names]


class ObjectDetector:
    """A folder of a detector, such as one of faces, for transformers' `AutoModelForObjectDetection`."""

    THRESHOLD = 0.5  # score of a box, the default of transformers

    def __init__(self, path: Path, device: str):
        from transformers import AutoImageProcessor, AutoModelForObjectDetection

        self.processor = AutoImageProcessor.from_pretrained(path, local_files_only=True)
        self.net = _complete(AutoModelForObjectDetection, path).to(device).eval()

    @torch.no_grad()
    def __call__(self, image: torch.Tensor) -> list[tuple[int, int, int, int]]:
        """Boxes (left, top, right, bottom), in pixels and not empty, of all detections in an image (C, H, W) in [-1, 1]."""
        height, width = image.shape[1:]
        pixels = (rgb(image[None]) * 255).round().to(torch.uint8)
        inputs = self.processor(images=pixels, return_tensors="pt", input_data_format="channels_first")
        outputs = self.net(**inputs.to(self.net.device))
        (detections,) = self.processor.post_process_object_detection(
            outputs, self.THRESHOLD, target_sizes=[(height, width)]
        )
        boxes = []
        for left, top, right, bottom in detections["boxes"].round().int().tolist():
            box = (max(left, 0), max(top, 0), min(right, width), min(bottom, height))
            if box[0] < box[2] and box[1] < box[3]:
                boxes.append(box)
        return boxes


class Inception(_Network):
    """torch-fidelity's Inception v3 with the weights of its release: 2048 features, and 1008 logits beside them."""

    def __init__(self, path: Path, device: str):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        super().__init__(device)
        # refuses pickled code, which torch-fidelity would run
        torch.load(path, map_location="cpu", weights_only=True)
        layers = ["2048", "logits_unbiased"]
        self.net = FeatureExtractorInceptionV3("inception-v3-compat", layers, feature_extractor_weights_path=str(path))
        self.net.to(device).eval()

    def one(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.net((rgb(x) * 255).round().to(torch.uint8)), 1)


KINDS: dict[str, Callable[[Path, str], Any]] = {
    "sscd": SSCD,
    "clip": CLIP,
    "dino": DINO,
    "inception": Inception,
    "classifier": ImageClassifier,
    "detector": ObjectDetector,
}


def _size(processor: Any) -> tuple[int, int]:
    """(height, width) that an image processor asks for."""
    size = getattr(processor, "crop_size", None) or processor.size
    edge = size.get("shortest_edge")
    return (edge, edge) if edge else (size["height"], size["width"])
