"""Pixel-space diffusion models over diffusers' `UNet2DModel`, unconditional or class-conditional.

`PixelDDPM` is the handle that methods and evaluators see (see `methods.base.Model`): it hides the parameterisation
(epsilon or v prediction), draws every random number from per-row seeds, and samples with diffusers' own DDIM scheduler.
Symbols: alphas[t] is the cumulative product (often written with a bar), gamma = sqrt(alphas), sigma = sqrt(1 - alphas),
x_t = gamma x0 + sigma eps.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from raysweep.models.draws import normal_rows, uniform_rows


class PixelDDPM:
    """A U-Net and its noise schedule.

    Args:
        net: predicts epsilon or v for x_t of shape (n, C, H, W) and t of shape (n,).
        scheduler: a DDIM scheduler; its `prediction_type` says what `net` predicts ("epsilon" or "v_prediction").
        null_label: the class index that stands for "no class"; None for an unconditional network.
    """

    family = "pixel-ddpm"

    def __init__(self, net: UNet2DModel, scheduler: DDIMScheduler, null_label: int | None = None):
        self.net, self.scheduler, self.null_label = net, scheduler, null_label
        self.prediction: str = scheduler.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type {self.prediction!r} is not supported; valid: epsilon, v_prediction")
        self.alphas: torch.Tensor = scheduler.alphas_cumprod.double()

    @classmethod
    def build(cls, config: dict, seed: int) -> PixelDDPM:
        """A freshly initialised model. `config` holds `unet` and `scheduler` keyword arguments and `null_label`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = UNet2DModel(**config["unet"])
        return cls(net, DDIMScheduler(**config["scheduler"]), config.get("null_label"))

    @classmethod
    def load(cls, folder: str | Path) -> PixelDDPM:
        """Reads a diffusers folder (`DDIMPipeline.save_pretrained` layout, safetensors only)."""
        folder = Path(folder)
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"{folder}: not a diffusers pipeline folder (model_index.json is missing)")
        unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
        if not unet.is_file():
            pickles = [p.name for p in (folder / "unet").glob("*.bin")]
            found = f"; found {', '.join(pickles)}, but pickled weights are never loaded" if pickles else ""
            raise ValueError(f"{unet}: missing: weights must be in safetensors format{found}")
        try:
            net = UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True, low_cpu_mem_usage=False)
        except Exception as error:  # truncated or foreign files surface as many different exceptions
            raise ValueError(f"{unet}: cannot be read: {str(error).splitlines()[0]}") from error
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
        classes = net.config.num_class_embeds
        return cls(net, scheduler, classes - 1 if classes else None)

    def save(self, folder: str | Path) -> None:
        """Writes a folder that `DDIMPipeline.from_pretrained` reads."""
        DDIMPipeline(unet=self.net, scheduler=self.scheduler).save_pretrained(folder, safe_serialization=True)

    def fresh(self, seed: int) -> PixelDDPM:
        """The same architecture with newly drawn weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = UNet2DModel.from_config(self.net.config)
        return PixelDDPM(net.to(self.dtype), self.scheduler, self.null_label)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        size = self.net.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.net.config.in_channels, height, width

    @property
    def dtype(self) -> torch.dtype:
        return self.net.dtype

    @property
    def device(self) -> torch.device:
        return self.net.device

    def to(self, device: torch.device) -> PixelDDPM:
        """Moves the network and its schedule in place."""
        self.net.to(device)
        self.alphas = self.alphas.to(device)
        return self

    def noise(self, seeds: torch.Tensor) -> torch.Tensor:
        """Standard normal noise (n, C, H, W); row i depends on seeds[i] alone."""
        return normal_rows(seeds, self.shape).to(self.device, self.dtype)

    def uniform(self, seeds: torch.Tensor, columns: int) -> torch.Tensor:
        """Uniform numbers in [0, 1), float64, shape (n, columns); row i depends on seeds[i] alone."""
        return uniform_rows(seeds, columns).to(self.device)

    def gamma_sigma(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(gamma, sigma) at t, each of shape (n, 1, 1, 1), in the model's dtype."""
        a = self.alphas[t].view(-1, 1, 1, 1)
        return a.sqrt().to(self.dtype), (1 - a).sqrt().to(self.dtype)

    def add_noise(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t = gamma x0 + sigma eps."""
        gamma, sigma = self.gamma_sigma(t)
        return gamma * x0 + sigma * eps

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """The network's own output (epsilon or v). `cond` is ignored by an unconditional network."""
        labels = None
        if self.null_label is not None:
            labels = torch.full_like(t, self.null_label) if cond is None else cond
        return self.net(x_t, t, class_labels=labels).sample

    def eps(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """Predicted noise, whatever the parameterisation."""
        output = self.predict(x_t, t, cond)
        if self.prediction == "epsilon":
            return output
        gamma, sigma = self.gamma_sigma(t)
        return gamma * output + sigma * x_t

    def target(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What `predict` is trained to give: eps, or v = gamma eps - sigma x0."""
        if self.prediction == "epsilon":
            return eps
        gamma, sigma = self.gamma_sigma(t)
        return gamma * eps - sigma * x0

    def x0_error_weight(self, t: torch.Tensor) -> torch.Tensor:
        """w(t) with (predict - target)^2 = w(t) (x0_hat - x0)^2, shape (n, 1, 1, 1): gamma^2/sigma^2 or 1/sigma^2."""
        gamma, sigma = self.gamma_sigma(t)
        return (gamma / sigma) ** 2 if self.prediction == "epsilon" else 1 / sigma**2

    @torch.no_grad()
    def sample(
        self, cond: torch.Tensor | None, seeds: torch.Tensor, steps: int, guidance: float = 1.0, batch: int = 250
    ) -> torch.Tensor:
        """DDIM samples in [-1, 1], shape (n, C, H, W); image i depends only on seeds[i] and cond[i]."""
        parts = []
        for start in range(0, len(seeds), batch):
            rows = slice(start, start + batch)
            x = self.noise(seeds[rows])
            labels = None if cond is None else cond[rows].to(self.device)
            parts.append(self._ddim(x, self._sampler(steps), None, labels, guidance).cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def reconstruct(
        self, x0: torch.Tensor, seeds: torch.Tensor, t: int, steps: int, cond: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Noises x0 (n, C, H, W) to step t (rounded down to the sampler's grid) and denoises it in about `steps`."""
        scheduler = self._sampler(max(1, round(len(self.alphas) * steps / t)))
        start = int(scheduler.timesteps[scheduler.timesteps <= t][0])
        eps = self.noise(seeds)
        x_t = self.add_noise(x0.to(eps), eps, torch.full((len(x0),), start, device=self.device))
        return self._ddim(x_t, scheduler, start, None if cond is None else cond.to(self.device), 1.0).cpu()

    def _sampler(self, steps: int) -> DDIMScheduler:
        scheduler = DDIMScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(steps)
        return scheduler

    def _ddim(
        self,
        x: torch.Tensor,
        scheduler: DDIMScheduler,
        start: int | None,
        cond: torch.Tensor | None,
        guidance: float,
    ) -> torch.Tensor:
        """Denoises x from step `start` (None: the first) to 0 on the scheduler's grid."""
        self.net.eval()
        for t in scheduler.timesteps:
            if start is not None and t > start:
                continue
            times = torch.full((len(x),), int(t), device=x.device)
            output = self.predict(x, times, cond)
            if guidance != 1.0 and cond is not None and self.null_label is not None:
                free = self.predict(x, times, torch.full_like(cond, self.null_label))
                output = free + guidance * (output - free)
            x = scheduler.step(output, t, x).prev_sample
        return x.clamp(-1, 1)
