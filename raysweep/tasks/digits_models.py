"""Network configurations of the embedded tasks' models, and the words that their captions use.

The miniatures (`raysweep.miniature`) are built from the same configurations.
"""

from __future__ import annotations

from typing import Any

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STYLES = ("plain", "inverted")

_SMALL_UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
}
_COSINE_V: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
}

# A pixel DDPM: diffusers' UNet2DModel and its noise schedule.
UNET = _SMALL_UNET | {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
SCHEDULER = _COSINE_V | {"clip_sample": True}

# A latent text-to-image pipeline.
TEXT: dict[str, Any] = {
    "words": ["a", "an", "the", "digit", "number", "inverted", *WORDS],
    "token_scale": 50.0,
    "text_encoder": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 8,
    },
    "unet": _SMALL_UNET
    | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 64,
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 8,
    },
    "vae": {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 16,
    },
    "scheduler": _COSINE_V | {"clip_sample": False, "steps_offset": 1},
}

# A contrastive model of open_clip.
CLIP: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 8, "patch_size": 2, "width": 64, "layers": 2, "head_width": 16},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
    },
    "preprocess_cfg": {"size": [8, 8], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    "fixed": ["token_embedding"],  # random embeddings work as well as trained ones here, and train faster
}
