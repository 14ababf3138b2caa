"""Shared parts of the GPU benchmark: sizes of networks, and the device with its clock, its memory and a model to train."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from plain import LAM, MIX, RHO, SAMPLER_STEPS

from methods.base import Goal, Method
from methods.rows import Rows
from raysweep.models.embeddings import Embeddings
from raysweep.models.latent import LatentText
from raysweep.models.noise import normal_rows, row_seeds
from raysweep.planning import footprint
from raysweep.registry import resolve

GIB = 2**30
WORDS = ("a", "photo", "of", "cat", "dog", "car", "tree", "house", "bird")
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
# The public configurations of Stable Diffusion v1.4 and of Stable Diffusion 3 medium.
FULL: dict[str, Any] = {
    "unet": footprint.STABLE_DIFFUSION,
    "vae": footprint.AUTOENCODER | {"sample_size": 512},
    "text_encoder": footprint.TEXT_ENCODER | {"max_position_embeddings": footprint.TEXT_LENGTH},
    "batches": (1, 2, 4, 8, 16, 24, 32, 48, 64, 96),
    "sampled": (8, 32),
    "steps": 50,
    "transformer": {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "out_channels": 16,
        "pos_embed_max_size": 192,
    },
    "transformer_batches": (4, 16),
    "latent": 64,
    "tokens": 154,
}
TOY: dict[str, Any] = {
    "unet": {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "vae": {
        "block_out_channels": (8, 8),
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 16,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
    "text_encoder": {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
    },
    "batches": (1, 2),
    "sampled": (2,),
    "steps": 2,
    "transformer": {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 16,
        "out_channels": 4,
        "pos_embed_max_size": 8,
    },
    "transformer_batches": (2,),
    "latent": 8,
    "tokens": 6,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "finetune": {},
    "siss": {"rho": RHO, "lam": MIX},
    "rgd": {"lam": LAM, "trunc_elem_sq": None},
    "salun": {"relabel": "override"},
    "esd": {"sampler_steps": SAMPLER_STEPS},
    "sfd": {},
}
SPLITS = {"forget": 1, "retain": 2, "remain": 3}
LONG = 8  # a step longer than this many seconds divided by the repeats is timed less often, but at least twice
ROW = 2  # steps in a row without waiting, as in a run
COMPILED = ("finetune", "siss", "rgd")  # each takes about a minute to compile


class Bench:
    """The device, the sizes and the time that is left.

    Args:
        toy: a small network on any machine.
        seconds: after which no further measurement begins; what is left out is named.
    """

    def __init__(self, toy: bool, seconds: float, repeats: int):
        self.sizes, self.toy, self.repeats = (TOY if toy else FULL), toy, 1 if toy else repeats
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.until = time.monotonic() + seconds
        self.left_out: list[str] = []
        self.rate = 0.0  # FLOP/s of a large bf16 product
        self.flop: dict[tuple[str, int], float] = {}  # of a step by method and batch, counted where it is not compiled
        self.total = torch.cuda.mem_get_info()[1] if self.device.type == "cuda" else 2**62

    def may(self, measurement: str) -> bool:
        """Whether there is time for one more measurement; notes measurement is left out."""
        if time.monotonic() > self.until:
            self.left_out.append(measurement)
            return False
        return True

    def tell(self, entry: dict[str, Any]) -> dict[str, Any]:
        """The entry, on standard error at once: a run that is cut short keeps it."""
        print(json.dumps(entry), file=sys.stderr, flush=True)
        return entry

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any], warm: int = 2, repeats: int | None = None, row: int = ROW) -> list[float]:
        """Seconds of one `run`, for each repetition of a row of them in which the host does not wait for the device."""
        times = []
        for k in range(warm + (repeats or self.repeats)):
            self.wait()
            started = time.perf_counter()
            for _ in range(row):
                run()
            self.wait()
            if k >= warm:
                times.append((time.perf_counter() - started) / row)
        return times

    def clear(self) -> None:
        """Frees the device memory of the last contender."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float | None:
        return torch.cuda.max_memory_allocated() / GIB if self.device.type == "cuda" else None

    def model(self) -> LatentText:
        """A latent text-to-image model with random weights, its U-Net to be trained and its prompts embedded."""
        sizes = self.sizes
        config = {
            "words": WORDS,
            "unet": {"in_channels": 4, "out_channels": 4} | sizes["unet"],
            "vae": sizes["vae"],
            "text_encoder": sizes["text_encoder"],
            "scheduler": SCHEDULER,
        }
        with self.device:
            model = LatentText.build(config, 0)
        model.to(self.device).train_only(("unet",))
        model.embeddings = Embeddings.of(model, torch.cat([self.prompts(model), model.unconditional(1).cpu()]))
        return model

    def prompts(self, model: LatentText) -> torch.Tensor:
        return model.tokens([f"a photo of a {w}" for w in WORDS[3:]])

    def goal(self, model: LatentText) -> Goal:
        asked = [tuple(p) for p in self.prompts(model).tolist()]
        return Goal("concept", 0, 1, tuple(range(len(asked))), asked[0], tuple(enumerate(asked)))

    def batch(self, model: LatentText, rows: int) -> dict[str, Rows]:
        """Random latents; all splits under one prompt, as a memorised caption has it, so that SISS needs one pass."""
        cond = self.prompts(model)[:1].expand(rows, -1).to(self.device)
        batch = {}
        for name, stream in SPLITS.items():
            seeds = row_seeds(stream, 0, rows)
            batch[name] = Rows(normal_rows(seeds, model.shape).to(self.device, torch.float32), cond, seeds, rows)
        return batch

    def ours(self, name: str, model: LatentText, rows: int) -> Method:
        """The method as a worker builds it."""
        cls = resolve("method", name)
        hp = cls.Hyperparameters(batch_size=rows, lr=1e-6, steps=10**6, **SETTINGS[name])
        prepared = {}
        if name == "salun":  # random instead of a saliency of the same size
            prepared = {n: torch.randn_like(p) for n, p in model.net.named_parameters() if p.requires_grad}
        return cls(model, hp, prepared, self.goal(model))
