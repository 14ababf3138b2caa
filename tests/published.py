"""The network of the published EDM snapshots, under the tensor names of the release, and its pickle.

It is written from the papers with convolutions alone, as an independent reference for `raysweep.models.song`, which is made
of diffusers' parts. The pickles have the layout of the release: every object is rebuilt by a function of a module that is not
installed, from a dictionary with the source of its class and its state.
"""

from __future__ import annotations

import contextlib
import math
import pickle
import sys
from types import ModuleType

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

DDPMPP = {
    "embedding_type": "positional",
    "encoder_type": "standard",
    "channel_mult_noise": 1,
    "resample_filter": [1, 1],
}
NCSNPP = {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}


def _reconstruct_persistent_obj(meta):
    raise AssertionError("code of a pickle ran")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class EasyDict(dict):
    __module__ = "dnnlib.util"
    __qualname__ = "EasyDict"


class Persistent:
    """Pickles in the layout of the release."""

    def __reduce__(self):
        state = dict(self.__dict__)
        meta = {
            "type": "class",
            "version": 6,
            "module_src": "raise SystemExit('code of a pickle ran')",
            "class_name": type(self).__name__,
            "state": state,
        }
        return _reconstruct_persistent_obj, (meta,), None


class Module(Persistent, nn.Module):
    pass


class Linear(Module):
    def __init__(self, cin, cout, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(cout, cin) / math.sqrt(cin))
        self.bias = nn.Parameter(0.1 * torch.randn(cout)) if bias else None

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class GroupNorm(Module):
    def __init__(self, channels):
        super().__init__()
        self.groups = min(32, channels // 4)
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(channels))
        self.bias = nn.Parameter(0.1 * torch.randn(channels))

    def forward(self, x):
        return F.group_norm(x, self.groups, self.weight, self.bias, 1e-6)


class Conv2d(Module):
    def __init__(self, cin, cout, kernel, resample=None, taps=(1, 1), fused=False):
        super().__init__()
        self.resample, self.fused = resample, fused
        self.weight = nn.Parameter(torch.randn(cout, cin, kernel, kernel) / math.sqrt(cin * kernel**2))
        self.bias = nn.Parameter(0.1 * torch.randn(cout))
        line = torch.as_tensor(taps, dtype=torch.float32)
        taps2 = line.outer(line) / line.sum() ** 2
        self.register_buffer("resample_filter", taps2[None, None] if resample else None)

    def forward(self, x):
        half = self.weight.shape[-1] // 2
        if self.resample is None:
            return F.conv2d(x, self.weight, self.bias, padding=half)
        taps = self.resample_filter.to(x)
        pad, channels = (taps.shape[-1] - 1) // 2, x.shape[1]
        if self.fused:
            x = F.conv2d(x, self.weight, padding=half + pad)
            x = F.conv2d(x, taps.repeat(x.shape[1], 1, 1, 1), groups=x.shape[1], stride=2)
            return x + self.bias[:, None, None]
        taps = taps.repeat(channels, 1, 1, 1)
        if self.resample == "up":
            x = F.conv_transpose2d(x, 4 * taps, groups=channels, stride=2, padding=pad)
        else:
            x = F.conv2d(x, taps, groups=channels, stride=2, padding=pad)
        return F.conv2d(x, self.weight, self.bias, padding=half)


class UNetBlock(Module):
    def __init__(self, cin, cout, width, taps, resample=None, attention=False):
        super().__init__()
        self.skip_scale = np.sqrt(0.5)
        self.cin, self.attention = cin, attention
        self.norm0, self.conv0 = GroupNorm(cin), Conv2d(cin, cout, 3, resample, taps)
        self.affine = Linear(width, cout)
        self.norm1, self.conv1 = GroupNorm(cout), Conv2d(cout, cout, 3)
        self.skip = Conv2d(cin, cout, 1, resample, taps) if cin != cout or resample else None
        if attention:
            self.norm2, self.qkv, self.proj = GroupNorm(cout), Conv2d(cout, 3 * cout, 1), Conv2d(cout, cout, 1)

    def forward(self, x, emb):
        h = self.conv0(F.silu(self.norm0(x)))
        h = self.conv1(F.silu(self.norm1(h + self.affine(emb)[:, :, None, None])))
        x = (h + (x if self.skip is None else self.skip(x))) * float(self.skip_scale)
        if not self.attention:
            return x
        q, k, v = self.qkv(self.norm2(x)).reshape(len(x), x.shape[1], 3, -1).unbind(2)
        weights = torch.einsum("ncq,nck->nqk", q, k / math.sqrt(x.shape[1])).softmax(2)
        attended = torch.einsum("nqk,nck->ncq", weights, v).reshape(x.shape)
        return (x + self.proj(attended)) * float(self.skip_scale)


class PositionalEmbedding(Module):
    def __init__(self, channels):
        super().__init__()
        self.num_channels = channels

    def forward(self, t):
        half = self.num_channels // 2
        x = t.outer((1 / 10000) ** (torch.arange(half).to(t) / (half - 1)))
        return torch.cat([x.cos(), x.sin()], 1)


class FourierEmbedding(Module):
    def __init__(self, channels):
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * 16)

    def forward(self, t):
        x = t.outer(2 * math.pi * self.freqs)
        return torch.cat([x.cos(), x.sin()], 1)


class SongUNet(Module):
    def __init__(
        self,
        img_resolution,
        channels,
        label_dim,
        augment_dim,
        model_channels,
        channel_mult,
        num_blocks,
        attn_resolutions,
        embedding_type,
        encoder_type,
        channel_mult_noise,
        resample_filter,
        label_dropout=0.0,
    ):
        super().__init__()
        self.label_dropout = label_dropout
        width, noise = model_channels * 4, model_channels * channel_mult_noise
        self.map_noise = (FourierEmbedding if embedding_type == "fourier" else PositionalEmbedding)(noise)
        self.map_label = Linear(label_dim, noise) if label_dim else None
        self.map_augment = Linear(augment_dim, noise, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = Linear(noise, width), Linear(width, width)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        cout, aux, skips = channels, channels, []
        for level, mult in enumerate(channel_mult):
            res = f"{img_resolution >> level}x{img_resolution >> level}"
            attends = img_resolution >> level in attn_resolutions
            if level == 0:
                cout = model_channels
                self.enc[f"{res}_conv"] = Conv2d(channels, cout, 3)
            else:
                self.enc[f"{res}_down"] = UNetBlock(cout, cout, width, resample_filter, "down")
                if encoder_type == "residual":
                    self.enc[f"{res}_aux_residual"] = Conv2d(aux, cout, 3, "down", resample_filter, fused=True)
                    aux = cout
            skips.append(cout)
            for i in range(num_blocks):
                cin, cout = cout, model_channels * mult
                self.enc[f"{res}_block{i}"] = UNetBlock(cin, cout, width, resample_filter, attention=attends)
                skips.append(cout)
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = f"{img_resolution >> level}x{img_resolution >> level}"
            attends = img_resolution >> level in attn_resolutions
            if level == len(channel_mult) - 1:
                self.dec[f"{res}_in0"] = UNetBlock(cout, cout, width, resample_filter, attention=True)
                self.dec[f"{res}_in1"] = UNetBlock(cout, cout, width, resample_filter)
            else:
                self.dec[f"{res}_up"] = UNetBlock(cout, cout, width, resample_filter, "up")
            for i in range(num_blocks + 1):
                cin, cout = cout + skips.pop(), model_channels * mult
                last = attends and i == num_blocks
                self.dec[f"{res}_block{i}"] = UNetBlock(cin, cout, width, resample_filter, attention=last)
        self.dec[f"{res}_aux_norm"] = GroupNorm(cout)
        self.dec[f"{res}_aux_conv"] = Conv2d(cout, channels, 3)

    def forward(self, x, noise_labels, class_labels):
        """class_labels: one-hot rows, zeros for no class."""
        emb = self.map_noise(noise_labels)
        emb = emb.reshape(len(x), 2, -1).flip(1).reshape(emb.shape)
        if self.map_label is not None:
            emb = emb + self.map_label(class_labels * math.sqrt(class_labels.shape[1]))
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        skips, aux = [], x
        for name, layer in self.enc.items():
            if "aux" in name:
                x = skips[-1] = aux = (x + layer(aux)) / math.sqrt(2)
            else:
                x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
                skips.append(x)
        for layer in self.dec.values():
            if isinstance(layer, UNetBlock):
                x = layer(x if x.shape[1] == layer.cin else torch.cat([x, skips.pop()], 1), emb)
            else:
                x = layer(x if isinstance(layer, GroupNorm) else F.silu(x))
        return x


class DhariwalUNet(Module):
    """Another network of the release, which raysweep refuses."""


class EDMPrecond(Module):
    def __init__(self, model, img_resolution, sigma_data=0.5):
        super().__init__()
        self.img_resolution, self.sigma_min, self.sigma_max, self.sigma_data = (
            img_resolution,
            0,
            float("inf"),
            sigma_data,
        )
        self.use_fp16 = False
        self.model = model


class VPPrecond(EDMPrecond):
    """Another preconditioning of the release, which raysweep refuses."""


class EDMLoss(Persistent):
    def __init__(self):
        self.P_mean, self.P_std, self.sigma_data = -1.1, 1.3, 0.5


def network(style: dict, classes: int = 10, seed: int = 0, **more) -> SongUNet:
    """A small network of either style, with weights of ordinary size."""
    kwargs = {
        "img_resolution": 8,
        "channels": 3,
        "label_dim": classes,
        "augment_dim": 9,
        "model_channels": 16,
        "channel_mult": [1, 2],
        "num_blocks": 2,
        "attn_resolutions": [4],
    }
    torch.manual_seed(seed)
    return SongUNet(**kwargs | style | more)


def snapshot(net: nn.Module, **more) -> dict:
    """The content of a published file."""
    return {
        "ema": EDMPrecond(net, 8),
        "loss_fn": EDMLoss(),
        "augment_pipe": None,
        "dataset_kwargs": EasyDict(path="cifar10.zip", use_labels=True),
    } | more


def pickled(content: object) -> bytes:
    """The bytes of a published file."""
    with _modules():
        return pickle.dumps(content)


@contextlib.contextmanager
def _modules():
    names = ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")
    modules = {name: ModuleType(name) for name in names}
    modules["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    modules["dnnlib.util"].EasyDict = EasyDict
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
