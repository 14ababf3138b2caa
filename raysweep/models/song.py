"""The U-Nets of the published EDM snapshots, DDPM++ and NCSN++, built from the parts of diffusers.

Sources: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021,
arXiv:2011.13456, appendix C; in the form of Karras et al., NeurIPS 2022, arXiv:2206.00364, table 1 and appendix C.
They differ from `UNet2DModel` as follows:
- a resampling block also projects on its skip path;
- attention follows every encoder block of its resolution, but in the decoder only the last one;
- the class is embedded before the layers of the noise level's embedding, from a one-hot vector times the root of the number of
  classes;
- NCSN++ (`encoder="residual"`) adds the image, resampled by a filter and projected, at each resolution.
Dropout and the augmentation labels of training are left out.
"""

from __future__ import annotations

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import FirDownsample2D
from diffusers.models.embeddings import GaussianFourierProjection, TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn
from torch.nn import functional as F

FILTER = (1, 3, 3, 1)  # the filter of NCSN++, and the only one in diffusers; DDPM++ averages and repeats
ROOT2 = math.sqrt(2)
EPS = 1e-6


def _groups(channels: int) -> int:
    return min(32, channels // 4)


class Block(nn.Module):
    """A residual block, with attention if asked for: (n, cin, H, W) and an embedding (n, width) to (n, cout, H', W').

    resample: "up" or "down" by two, or None. fir: resamples by `FILTER`.
    """

    def __init__(
        self, cin: int, cout: int, width: int, fir: bool = False, resample: str | None = None, attention: bool = False
    ):
        super().__init__()
        self.resample = resample
        self.resnet = ResnetBlock2D(
            in_channels=cin,
            out_channels=cout,
            temb_channels=width,
            groups=_groups(cin),
            groups_out=_groups(cout),
            eps=EPS,
            skip_time_act=True,
            output_scale_factor=ROOT2,
            use_in_shortcut=cin != cout or resample is not None,
            up=resample == "up",
            down=resample == "down",
            kernel="fir" if fir else "sde_vp",
        )
        self.attention = None
        if attention:
            self.attention = Attention(
                cout,
                heads=1,
                dim_head=cout,
                bias=True,
                norm_num_groups=_groups(cout),
                eps=EPS,
                residual_connection=True,
                rescale_output_factor=ROOT2,
                upcast_softmax=True,
                _from_deprecated_attn_block=True,
            )

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        x = self.resnet(x, emb)
        return x if self.attention is None else self.attention(x)


class SongUNet(ModelMixin, ConfigMixin):
    """A U-Net that is called as a `UNet2DModel`: with (n, C, H, W), ln(s)/4 (n,) and class labels (n,) or None.

    Returns an object with `sample`. The label after the last class stands for no class, as None does.

    Args:
        num_class_embeds: number of classes; None: unconditional.
        channel_mult: width of each resolution in units of `model_channels`, the finest first.
        emb_width: width of the embedding, in the same units.
        attn_resolutions: sizes of feature maps, in pixels, that are attended to.
        embedding: embedding of the noise level: "positional" (DDPM++), or "fourier" (NCSN++) of `noise_width` model channels.
        encoder: "standard" (DDPM++), or "residual" (NCSN++).
        fir: resamples by `FILTER` (NCSN++).
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        num_class_embeds: int | None = None,
        model_channels: int = 128,
        channel_mult: tuple[int, ...] = (2, 2, 2),
        emb_width: int = 4,
        num_blocks: int = 4,
        attn_resolutions: tuple[int, ...] = (16,),
        embedding: str = "positional",
        noise_width: int = 1,
        encoder: str = "standard",
        fir: bool = False,
    ):
        super().__init__()
        width, noise = model_channels * emb_width, model_channels * noise_width
        self.time_proj = (
            GaussianFourierProjection(noise // 2, 16.0, log=False, flip_sin_to_cos=False)
            if embedding == "fourier"
            else Timesteps(noise, flip_sin_to_cos=False, downscale_freq_shift=1)
        )
        self.class_embedding = nn.Linear(num_class_embeds, noise) if num_class_embeds else None
        self.time_embedding = TimestepEmbedding(noise, width, act_fn="silu", post_act_fn="silu")
        self.conv_in = nn.Conv2d(in_channels, model_channels, 3, padding=1)
        self.down_blocks, self.mid_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.residuals = nn.ModuleList() if encoder == "residual" else None

        cout, aux, skips = model_channels, in_channels, [model_channels]
        for level, mult in enumerate(channel_mult):
            attends = sample_size >> level in attn_resolutions
            if level:
                self.down_blocks.append(Block(cout, cout, width, fir, "down"))
                skips.append(cout)
                if self.residuals is not None:
                    self.residuals.append(FirDownsample2D(aux, cout, use_conv=True, fir_kernel=FILTER))
                    aux = cout
            for _ in range(num_blocks):
                cin, cout = cout, model_channels * mult
                self.down_blocks.append(Block(cin, cout, width, fir, attention=attends))
                skips.append(cout)
        self.mid_blocks.extend([Block(cout, cout, width, fir, attention=True), Block(cout, cout, width, fir)])
        for level, mult in reversed(list(enumerate(channel_mult))):
            attends = sample_size >> level in attn_resolutions
            if level < len(channel_mult) - 1:
                self.up_blocks.append(Block(cout, cout, width, fir, "up"))
            for i in range(num_blocks + 1):
                cin, cout = cout + skips.pop(), model_channels * mult
                self.up_blocks.append(Block(cin, cout, width, fir, attention=attends and i == num_blocks))
        self.conv_norm_out = nn.GroupNorm(_groups(cout), cout, eps=EPS)
        self.conv_out = nn.Conv2d(cout, out_channels, 3, padding=1)
        self._draw_weights()

    def _draw_weights(self) -> None:
        """Draws weights as at the start of the published training, where each block adds almost nothing."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                last = name.endswith((".conv2", ".to_out.0")) or name == "conv_out"
                gain = 1e-5 if last else math.sqrt(0.2) if name.endswith((".to_q", ".to_k", ".to_v")) else 1.0
                nn.init.xavier_uniform_(module.weight, gain)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor | None = None) -> UNet2DOutput:
        emb = self.time_proj(t.expand(len(x))).to(x.dtype)
        if self.class_embedding is not None:
            classes = self.class_embedding.in_features
            one_hot = emb.new_zeros(len(x), classes)
            if class_labels is not None:
                one_hot = F.one_hot(class_labels, classes + 1)[:, :-1].to(emb)
            emb = emb + self.class_embedding(math.sqrt(classes) * one_hot)
        emb = self.time_embedding(emb)

        aux, residuals = x, iter(self.residuals or ())
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x = block(x, emb)
            if block.resample and self.residuals is not None:
                x = aux = (x + next(residuals)(aux)) / ROOT2
            skips.append(x)
        for block in self.mid_blocks:
            x = block(x, emb)
        for block in self.up_blocks:
            x = block(x if block.resample else torch.cat([x, skips.pop()], 1), emb)
        return UNet2DOutput(sample=self.conv_out(F.silu(self.conv_norm_out(x))))
