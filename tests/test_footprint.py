"""Sizes of networks from their configuration; the memory that methods state against what their steps hold."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from method_table import EDITS, PIXEL, TRAINED, build
from tiny import batch_for, tiny_task
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raysweep.models.pixel import PixelDDPM
from raysweep.planning import footprint
from raysweep.registry import resolve


class Peak(TorchDispatchMode):
    """Counts the bytes of all storages that operations make and that are alive; `most` is the highest count."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self.seen: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.seen:
            self.seen[storage] = size = storage.nbytes()
            self.live += size
            self.most = max(self.most, self.live)
            weakref.finalize(storage, self.drop, size)

    def drop(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return out


def peak(name: str, width: int, batch: int) -> tuple[int, footprint.Footprint, bool]:
    """(most bytes that two steps hold besides the task, the network's footprint, whether `Descent` keeps an average)."""
    kind = "points" if "points" in resolve("method", name).kinds else "class"
    task = tiny_task(kind)
    sizes = dict.fromkeys(("batch_size", "forget_batch_size", "stage1_batch_size"), batch)
    counts = dict.fromkeys(("replay_per_class", "fisher_per_class", "fisher_timesteps", "inner_every"), 1)
    fields = resolve("method", name).Hyperparameters.model_fields
    settings = {k: v for k, v in (sizes | counts).items() if k in fields}
    labels = torch.zeros(1, dtype=torch.long) if kind == "class" else None
    with Peak() as counted:
        config = {**task.model, "unet": task.model["unet"] | {"block_out_channels": (width, width)}}
        model = PixelDDPM.build(config, 0)
        method, _ = build(name, task, dtype=torch.float32, model=model, **settings)
    network = footprint.measured(
        model.net, lambda: model.predict(torch.zeros(1, 1, 4, 4), torch.zeros(1).long(), labels)
    )
    gc.collect()
    counted.most = counted.live
    with counted:
        for step in range(min(2, method.steps)):
            method.step(batch_for(method, task, step))
    return counted.most, network, bool(getattr(method, "average", []))


@pytest.mark.parametrize("name", [n for n in TRAINED if n in PIXEL])
def test_methods_hold_the_memory_that_they_state(name):
    method = resolve("method", name)
    sizes = ((64, 1), (8, 128))  # mostly weights, and mostly activations
    for width, batch in sizes[:1] if name in EDITS else sizes:  # an edit has no backward pass
        most, network, averaged = peak(name, width, batch)
        copies = method.copies + averaged
        stated = footprint.SINGLE * network.parameters * copies + network.activations * batch * method.tape
        assert most == pytest.approx(stated, rel=0.15)


@pytest.mark.parametrize(
    ("network", "parameters"), [({"stable_diffusion": {}}, 859_520_964), ({"clip": "ViT-B-32"}, 151_277_313)]
)
def test_known_networks_have_their_known_sizes(network, parameters):
    known = footprint.of(network)
    assert known.parameters == parameters
    assert known.flops > 0
    if "stable_diffusion" in network:
        assert known.others["text_encoder"] == 123_060_480
        assert known.trained(("unet",)) == parameters
        assert known.trained(()) == parameters + known.others["text_encoder"]


# Of the medium model, as the libraries count the published parts. The sizes of transformer and autoencoder are those of
# scripts/convert_sd3_to_diffusers.py in huggingface/diffusers with the depth of arXiv:2403.03206 (24), those of the text encoders of
# openai/clip-vit-large-patch14, laion/CLIP-ViT-bigG-14-laion2B-39B-b160k and google/t5-v1_1-xxl.
SD3_MEDIUM = {
    "transformer": 2_028_328_000,
    "text_encoder": 123_650_304,
    "text_encoder_2": 694_659_840,
    "text_encoder_3": 4_762_310_656,
    "vae": 83_819_683,
}


def test_stable_diffusion_3_is_counted_by_part():
    """Of the network's 24 blocks two are run here: all of them take a quarter of a minute."""
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        whole = SD3Transformer2DModel(**footprint.STABLE_DIFFUSION_3)
    assert sum(p.numel() for p in whole.parameters()) == SD3_MEDIUM["transformer"]
    network = footprint.of({"stable_diffusion_3": {"num_layers": 2}})
    assert network.others == {name: size for name, size in SD3_MEDIUM.items() if name != "transformer"}
    assert network.trained(("transformer",)) == network.parameters
    assert network.trained(()) == network.parameters + sum(network.others.values()) - SD3_MEDIUM["vae"]
    assert 0 < network.adaptable < network.parameters
    # 4,096 image and 333 text tokens: two operations per weight and token in a block's matrices, and their attention
    tokens, width = 64 * 64 + 333, 1536
    least = 2 * (2 * 12 * width**2 * 64 * 64 + 2 * tokens**2 * width)
    assert least < network.flops < 2 * least
    assert 0 < network.mixed < network.activations


@pytest.mark.slow
def test_the_dry_run_of_stable_diffusion_3_medium():
    """Time and memory of every method of a preset, from the configuration alone."""
    from raysweep.config import presets
    from raysweep.config.reader import load
    from raysweep.planning import forecast
    from raysweep.search.spaces import load as load_space

    network = footprint.of({"stable_diffusion_3": {}})
    assert {"transformer": network.parameters} | network.others == SD3_MEDIUM
    plans = {}
    for modules in ("[transformer]", "[]"):
        sweep = load(presets.path_of("rgd-sd-artist"), (f"train.modules={modules}",), absent=True)
        spaces = [load_space(name, sweep.spaces.get(name), "concept") for name in sweep.methods]
        plans[modules] = forecast.forecast(sweep, network, spaces)
    one, every = plans["[transformer]"], plans["[]"]
    for method, size in one.memory.items():
        assert size > 4 * (sum(SD3_MEDIUM.values()) + resolve("method", method).copies * SD3_MEDIUM["transformer"])
        assert every.memory[method] > size + 3 * 4 * SD3_MEDIUM["text_encoder_3"]
    assert one.gpu_hours == every.gpu_hours > 0


def test_arithmetic_and_activations_of_a_layer():
    layer = torch.nn.Sequential(
        torch.nn.Linear(10, 30, bias=False), torch.nn.ReLU(), torch.nn.Linear(30, 5, bias=False)
    )
    size = footprint.measured(layer, lambda: layer(torch.zeros(4, 10, requires_grad=True)), rows=4)
    assert size.parameters == 450
    assert size.flops == 2 * (10 * 30 + 30 * 5)
    assert size.activations == 4 * (10 + 30)  # inputs of both layers; the ReLU keeps its output, which is one of them


def test_attention_counts_as_fused():
    q = torch.zeros(1, 2, 50, 8, device="meta", requires_grad=True)
    module = torch.nn.Linear(1, 1, device="meta")
    size = footprint.measured(module, lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert size.flops == 4 * 2 * 50 * 50 * 8
    assert size.activations == 2 * 4 * 2 * 50 * 8  # query, key and value, which are one tensor, and the output


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="'mamba' is not an architecture"):
        footprint.of({"mamba": {}})
