"""EDM models: a U-Net of diffusers or of the release under the preconditioning, noise levels and Heun sampler of Karras et al.

Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022, arXiv:2206.00364,
table 1. With noise level s (their sigma) and d the standard deviation of the data:
    D(x; s) = c_skip x + c_out F(c_in x; ln(s)/4),   x = x0 + s eps
    c_skip = d^2/(s^2 + d^2),   c_out = s d / sqrt(s^2 + d^2),   c_in = 1/sqrt(s^2 + d^2)
    loss = (s^2 + d^2)/(s d)^2 |D - x0|^2 = |F - (x0 - c_skip x)/c_out|^2,   ln s ~ N(p_mean, p_std^2)
Methods and checks speak of steps t and of x_t = gamma x0 + sigma eps. Here step t has the noise level at the
(t + 1/2)/T quantile of that normal distribution, so that a uniform t is the paper's distribution, and x_t = x/sqrt(1 + s^2);
`predict` gives F, so a mean squared error against `target` is the paper's loss. (The released code sums it over the elements
of an image.) The paper's sampler is `samplers.Heun`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import EDMEulerScheduler, UNet2DModel

from raysweep.models import samplers, weights
from raysweep.models.configuration import plain
from raysweep.models.folders import INDEX, read_json
from raysweep.models.song import SongUNet
from raysweep.models.unet import OneUNet, draw_weights
from raysweep.models.validation import SCHEDULE, check_unet

CLASS = "EDMPipeline"
NETWORKS = {"unet": UNet2DModel, "song_unet": SongUNet}
LEVELS = {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
TRAINING = {"p_mean": -1.2, "p_std": 1.2, "steps": 1000}


class EDM(OneUNet):
    """A preconditioned U-Net.

    Args:
        net: F, called with c_in x (n, C, H, W), ln(s)/4 (n,) and class labels.
        levels: as `LEVELS`; the distribution of noise levels in training: as `TRAINING`.
        null_label: the class index that stands for "no class"; None for an unconditional network or one without such.
    """

    family = "edm"
    schedule_keys: ClassVar[frozenset[str]] = frozenset(LEVELS)
    default_sampler: ClassVar[samplers.Sampler] = samplers.Heun()

    def __init__(
        self,
        net: Any,
        levels: dict[str, float] | None = None,
        training: dict[str, float] | None = None,
        null_label: int | None = None,
    ):
        self.net, self.sampler, self.null_label = net, self.default_sampler, null_label
        self.edm, self.training = LEVELS | (levels or {}), TRAINING | (training or {})
        self.prediction = "edm"
        steps = int(self.training["steps"])
        quantiles = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
        log_levels = self.training["p_mean"] + self.training["p_std"] * torch.special.ndtri(quantiles)
        self.alphas = 1 / (1 + log_levels.exp() ** 2)

    @classmethod
    def build(cls, config: dict[str, Any], seed: int) -> EDM:
        """A freshly initialised model. `config` holds keyword arguments of `unet` or `song_unet`, and `levels`, `training`,
        `null_label`."""
        kind = next(k for k in NETWORKS if k in config)
        net = draw_weights(lambda: NETWORKS[kind](**config[kind]), seed)
        return cls(net, config.get("levels"), config.get("training"), config.get("null_label"))

    @classmethod
    def load(cls, folder: str | Path) -> EDM:
        """Reads a folder that `save` wrote; raises ValueError, saying what is wrong with it."""
        folder = Path(folder)
        index, config = read_json(folder / INDEX), read_json(folder / "unet" / "config.json")
        kind = next((n for n in NETWORKS.values() if n.__name__ == config.get("_class_name")), UNet2DModel)
        net = weights.read(kind, folder / "unet")
        check_unet(folder / "unet", net.config)
        settings = index.get("raysweep")
        training, null_label = _training(folder / INDEX, {} if settings is None else settings, net)
        model = cls(net, _levels(folder / "scheduler" / SCHEDULE), training, null_label)
        model.sampler = samplers.load(folder, model)
        return model

    def save(self, folder: str | Path) -> None:
        """Writes a folder whose parts diffusers reads, `UNet2DModel` (or `SongUNet`, by its own class) and `EDMEulerScheduler`.
        diffusers has no pipeline for them."""
        folder, network = Path(folder), type(self.net)
        library = "diffusers" if network is UNet2DModel else "raysweep"
        self.net.save_pretrained(folder / "unet", safe_serialization=True)
        EDMEulerScheduler(**self.edm).save_pretrained(folder / "scheduler")
        index = {
            "_class_name": CLASS,
            "unet": [library, network.__name__],
            "scheduler": ["diffusers", "EDMEulerScheduler"],
            "raysweep": {"training": self.training, "null_label": self.null_label},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2))
        samplers.save(folder, self)

    def schedule_settings(self) -> dict[str, Any]:
        return {"levels": plain(self.edm), "training": plain(self.training)}

    def with_net(self, net: Any) -> EDM:
        other = type(self)(net, self.edm, self.training, self.null_label)
        other.alphas = self.alphas
        return other

    def level(self, t: torch.Tensor) -> torch.Tensor:
        """The noise level s of steps t, (n, 1, 1, 1), float64."""
        return self.levels()[t].view(-1, 1, 1, 1)

    def scales(self, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(c_skip, c_out, c_in) at noise levels s, in the shape of s, float64."""
        d, total = self.edm["sigma_data"], s**2 + self.edm["sigma_data"] ** 2
        return d**2 / total, s * d / total.sqrt(), 1 / total.sqrt()

    def raw(self, x: torch.Tensor, s: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """F at x = x0 + s eps, s of shape (n, 1, 1, 1)."""
        labels = None
        if self.net.config.num_class_embeds:
            labels = self.unconditional(len(x)) if cond is None else cond
        scaled = (self.scales(s)[2] * x).to(self.dtype)
        return self.net(scaled, (s.flatten().log() / 4).to(self.dtype), class_labels=labels).sample

    def denoised(
        self, x: torch.Tensor, s: torch.Tensor, cond: torch.Tensor | None, guidance: float = 1.0
    ) -> torch.Tensor:
        """D(x; s), the predicted clean image, in the dtype of x; under classifier-free guidance, if there is a null label."""
        skip, out, _ = self.scales(s)
        null = None if cond is None or guidance == 1.0 else self.unconditional(len(x))
        if cond is None or null is None:
            f = self.raw(x, s, cond)
        else:  # both branches in one pass, as in `samplers.ddim`
            f, free = self.raw(torch.cat([x, x]), torch.cat([s, s]), torch.cat([cond, null])).chunk(2)
            f = free + guidance * (f - free)
        return (skip * x + out * f.to(x.dtype)).to(x.dtype)

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        s = self.level(t)
        return self.raw(x_t * (1 + s**2).sqrt().to(x_t), s, cond)

    def eps(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        s = self.level(t)
        x = x_t * (1 + s**2).sqrt()
        return ((x - self.denoised(x, s, cond)) / s).to(x_t.dtype)

    def x0(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        s = self.level(t)
        return self.denoised(x_t * (1 + s**2).sqrt(), s, cond).to(x_t.dtype)

    def outline(self, x: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        return self.raw(x, torch.ones(len(x), 1, 1, 1, device=x.device), cond)

    def eps_at(self, x: torch.Tensor, s: float, cond: torch.Tensor | None) -> torch.Tensor:
        """Predicted noise at x = x0 + s eps (n, C, H, W), for any s: the network's input is the noise level itself."""
        level = torch.full((len(x), 1, 1, 1), s, dtype=torch.float64, device=x.device)
        return (x - self.denoised(x, level, cond)) / s

    def target(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The training target of `predict`: (x0 - c_skip x)/c_out."""
        s = self.level(t)
        skip, out, _ = self.scales(s)
        return ((x0 - skip * (x0 + s * eps)) / out).to(x0.dtype)

    def x0_error_weight(self, t: torch.Tensor) -> torch.Tensor:
        """w(t) with (predict - target)^2 = w(t) (x0_hat - x0)^2: the paper's lambda = (s^2 + d^2)/(s d)^2."""
        return (1 / self.scales(self.level(t))[1] ** 2).to(self.dtype)


def _levels(path: Path) -> dict[str, float]:
    """The noise levels in a folder's scheduler; raises ValueError unless they are valid."""
    config = read_json(path)
    if config.get("_class_name", EDMEulerScheduler.__name__) != EDMEulerScheduler.__name__:
        raise ValueError(f"{path}: holds a {config['_class_name']}; an EDM model has an {EDMEulerScheduler.__name__}")
    levels = {k: config.get(k, v) for k, v in LEVELS.items()}
    for key, level in levels.items():
        if not (_is_number(level) and level > 0):
            raise ValueError(f"{path}: {key} is {level!r}; it must be a positive number")
    if levels["sigma_min"] >= levels["sigma_max"]:
        raise ValueError(f"{path}: sigma_min {levels['sigma_min']} is not below sigma_max {levels['sigma_max']}")
    return {k: float(v) for k, v in levels.items()}


def _training(path: Path, settings: Any, net: Any) -> tuple[dict[str, float], int | None]:
    """The distribution of noise levels in training and the null label, from an index's own settings."""
    training = settings.get("training", {}) if isinstance(settings, dict) else None
    if not isinstance(training, dict) or not training.keys() <= TRAINING.keys():
        raise ValueError(f"{path}: raysweep.training: may hold the numbers {', '.join(TRAINING)}")
    values = TRAINING | training
    if not all(map(_is_number, values.values())) or values["p_std"] <= 0 or int(values["steps"]) < 2:
        raise ValueError(
            f"{path}: raysweep.training: needs numbers, p_std above 0 and 2 steps or more; it is {training}"
        )
    null, classes = settings.get("null_label"), net.config.num_class_embeds or 0
    top = classes if isinstance(net, SongUNet) else classes - 1  # a SongUNet takes one more label, for no class
    if null is not None and not (isinstance(null, int) and 0 <= null <= top):
        raise ValueError(
            f"{path}: raysweep.null_label: {null!r} is not a class index of the network, 0 to {top}, or null"
        )
    return values, null


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
