"""Training of a small variational autoencoder, the frozen part of the embedded latent model.

The usual recipe of latent diffusion (Rombach et al., CVPR 2022, arXiv:2112.10752), without its adversarial loss: mean
absolute error of the reconstruction plus a small weight of Kullback-Leibler divergence. The scaling factor gives latents unit
standard deviation, as in the release.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL

KL_WEIGHT = 1e-4
BATCH = 48


def train_autoencoder(
    x: torch.Tensor, config: dict[str, Any], seed: int, steps: int = 250, lr: float = 3e-3
) -> AutoencoderKL:
    """An autoencoder of images (n, C, H, W) in [-1, 1], with its scaling factor set; `config`: its keyword arguments."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(**config)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    vae.train()
    for _ in range(steps):
        rows = x[torch.randint(len(x), (BATCH,), generator=generator)]
        posterior = vae.encode(rows).latent_dist
        rebuilt = vae.decode(posterior.sample(generator)).sample
        loss = (rebuilt - rows).abs().mean() + KL_WEIGHT * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    vae.eval()
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(256)])
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return vae
