"""Contrastive image-text models of open_clip, in folders that open_clip itself reads.

A folder holds `open_clip_config.json` and `open_clip_model.safetensors`, the layout of the hub and of open_clip's own saving:
`open_clip.create_model_from_pretrained("local-dir:FOLDER")` reads it. Conditions are the tokens of captions, (n, L).
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Self

import open_clip
import torch
from open_clip.constants import HF_SAFE_WEIGHTS_NAME
from safetensors.torch import save_file

from raysweep.models import weights
from raysweep.models.configuration import plain, tokenizer_settings
from raysweep.models.folders import OPEN_CLIP, TOKENIZER, quiet_logs, read_json, reading
from raysweep.models.handle import Handle
from raysweep.storage.files import digest_of


class Contrastive(Handle):
    """A CLIP model and its preprocessing of images and captions.

    Args:
        net: open_clip's model.
        config: `model_cfg` and `preprocess_cfg` as in `open_clip_config.json`; `fixed`: parameter names, or their beginnings,
            that never change.
        tokenizer: captions -> tokens (n, L).
    """

    family = "clip"
    reads: ClassVar[tuple[str, ...]] = (OPEN_CLIP, HF_SAFE_WEIGHTS_NAME, *TOKENIZER)

    def __init__(self, net: Any, config: dict[str, Any], tokenizer: Any):
        self.net, self.config, self.tokenizer = net, config, tokenizer
        for name, p in net.named_parameters():
            p.requires_grad_(not name.startswith(tuple(config.get("fixed", ())) or "\0"))
        preprocessing = open_clip.get_model_preprocess_cfg(net)
        self.mean, self.std = (torch.tensor(preprocessing[k]).view(1, 3, 1, 1) for k in ("mean", "std"))

    @classmethod
    def build(cls, config: dict[str, Any], seed: int) -> Contrastive:
        """A freshly initialised model of a configuration, on open_clip's own vocabulary."""
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
            (Path(folder) / OPEN_CLIP).write_text(json.dumps(config))
            torch.manual_seed(seed)
            with quiet_logs():
                net = open_clip.create_model(f"local-dir:{folder}", load_weights=False, device="cpu")
            return cls(net, config, open_clip.get_tokenizer(f"local-dir:{folder}"))

    @classmethod
    def load(cls, folder: str | Path) -> Contrastive:
        """Reads an open_clip folder, safetensors only; raises ValueError, saying what is wrong with it."""
        folder = Path(folder)
        for name in (OPEN_CLIP, HF_SAFE_WEIGHTS_NAME):
            if not (folder / name).is_file():
                raise ValueError(
                    f"{folder / name}: missing: not an open_clip folder with weights in safetensors format"
                )
        config, file = read_json(folder / OPEN_CLIP), folder / HF_SAFE_WEIGHTS_NAME
        shapes = weights.shapes_of([file])
        wrapped = weights.check_names(folder, shapes)
        with reading(folder), quiet_logs():
            net = open_clip.create_model(f"local-dir:{folder}", load_weights=False, device="cpu")
            tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
            needed = {n: tuple(t.shape) for n, t in net.state_dict().items()}
            # the library would interpolate embeddings of another length
            reshaped = {
                n: (s, needed[n]) for n, s in shapes.items() if n in needed and math.prod(s) != math.prod(needed[n])
            }
            if wrapped:
                report = weights.fill(net, {weights.plain_name(n): t for n, t in weights.tensors_of([file]).items()})
            elif not reshaped:
                keys = open_clip.load_checkpoint(net, str(file), strict=False)  # knows the names of older releases
                report = {"missing_keys": keys.missing_keys, "unexpected_keys": keys.unexpected_keys}
            else:
                report = {
                    "missing_keys": needed.keys() - shapes.keys(),
                    "unexpected_keys": shapes.keys() - needed.keys(),
                }
        reshaped |= {n: (tuple(a), tuple(b)) for n, a, b in report.get("mismatched_keys", ())}
        weights.check_tensors(folder, "model", len(needed), report["missing_keys"], report["unexpected_keys"], reshaped)
        weights.check_finite(folder, net)
        with reading(folder / OPEN_CLIP):
            model = cls(net, config, tokenizer)
            if model.mean.numel() != 3 or model.std.numel() != 3 or not bool((model.std > 0).all()):
                raise ValueError("preprocess_cfg: mean and std must be three numbers each, std above 0")
        return model

    def save(self, folder: str | Path) -> None:
        """Writes a folder that `open_clip.create_model_from_pretrained` reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / OPEN_CLIP).write_text(json.dumps(self.config, indent=2))
        save_file({n: t.contiguous() for n, t in self.net.state_dict().items()}, folder / HF_SAFE_WEIGHTS_NAME)
        if hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(folder)

    @property
    def settings(self) -> dict[str, Any]:
        """Plain data: the network's settings, and the preprocessing of images and captions."""
        return {
            "net": plain(self.config["model_cfg"]),
            "images": [self.mean.flatten().tolist(), self.std.flatten().tolist()],
            "captions": _caption_settings(self.tokenizer),
        }

    def with_net(self, net: Any) -> Contrastive:
        """Another network of the same architecture."""
        return type(self)(net, self.config, self.tokenizer)

    def fresh(self, seed: int) -> Contrastive:
        """The same architecture with newly drawn weights."""
        return self.with_net(self.build(self.config, seed).net.to(self.dtype))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        size = self.net.visual.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return 3, height, width

    def to(self, device: torch.device) -> Self:
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return super().to(device)

    @property
    def logit_scale(self) -> torch.Tensor:
        """Factor of the cosines before the softmax, a scalar."""
        return self.net.logit_scale.exp()

    def encode_image(self, x: torch.Tensor) -> torch.Tensor:
        """Embeddings (n, d), not normalised, of images (n, 3, H, W) in [-1, 1]."""
        return self.net.encode_image(((x + 1) / 2 - self.mean.to(x)) / self.std.to(x))

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings (n, d), not normalised, of captions."""
        return self.net.encode_text(tokens)

    def unconditional(self, count: int) -> None:
        """None: there is no branch without a caption."""

    def tokens(self, captions: list[str]) -> torch.Tensor:
        """The tokens of captions, (n, L)."""
        return self.tokenizer(captions)


def _caption_settings(tokenizer: Any) -> dict[str, Any]:
    """Plain data: everything that the tokens of a caption depend on."""
    inner = getattr(tokenizer, "tokenizer", None)  # of transformers, or open_clip's own vocabulary
    rules = {"rules": digest_of(tokenizer.encoder)} if inner is None else tokenizer_settings(inner)
    clean, special = tokenizer.clean_fn.__name__, getattr(tokenizer, "strip_sep_token", False)
    return {**rules, "length": tokenizer.context_length, "cleaning": clean, "strips": special}
