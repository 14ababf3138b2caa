"""A small folder of a model of each family, and the files of weights in it."""

from __future__ import annotations

from pathlib import Path

from tiny import LATENT, clip_model, edm_model, flow_model, tiny_model, tiny_task

from raysweep.miniature import models
from raysweep.models.latent import LatentText

UNET = "unet/diffusion_pytorch_model.safetensors"
FILES = {  # a file of weights of each family and of each part
    "pixel": (UNET,),
    "edm": (UNET,),
    "text": (UNET, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"),
    # its CLIP models and its autoencoder are of the same classes as those of "text"
    "flow": ("transformer/diffusion_pytorch_model.safetensors", "text_encoder_3/model.safetensors"),
    "clip": ("open_clip_model.safetensors",),
    "vlm": ("model.safetensors", "clip/model.safetensors"),
}


def save_families(root: Path) -> None:
    """Saves a model of each family in `FILES` to a folder of its name below `root`."""
    tiny_model(tiny_task()).save(root / "pixel")
    edm_model().save(root / "edm")
    LatentText.build(LATENT, 0).save(root / "text")
    flow_model().save(root / "flow")
    clip_model().save(root / "clip")
    models.untrained_vlm().save(root / "vlm")
