"""Tiny instances of the networks that users bring, in the file formats of the libraries."""

from __future__ import annotations

import json
from pathlib import Path

import torch


def clip_folder(folder: Path, seed: int = 0) -> Path:
    """An open_clip folder as the hub lays it out, with open_clip's default tokenizer."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    net = open_clip.CLIP(8, vision, text)
    folder.mkdir()
    config = {
        "model_cfg": {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {"size": [16, 16]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(dict(net.state_dict()), folder / "open_clip_model.safetensors")
    return folder


def dino_folder(folder: Path) -> Path:
    """A transformers folder of DINOv2."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=14, patch_size=7)
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 14}, crop_size={"height": 14, "width": 14}).save_pretrained(folder)
    return folder


def classifier_folder(folder: Path, names: tuple[str, ...], images: torch.Tensor, labels: torch.Tensor) -> Path:
    """A transformers folder of an image classifier, trained a little; its labels stand in another order than the task's."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    from evaluators.external import rgb

    torch.manual_seed(0)
    shuffled = list(reversed(names))
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=2,
        id2label=dict(enumerate(shuffled)),
        label2id={n: k for k, n in enumerate(shuffled)},
    )
    net = ViTForImageClassification(config)
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    wanted = torch.tensor([shuffled.index(names[k]) for k in labels.tolist()])
    for _ in range(80):
        loss = torch.nn.functional.cross_entropy(net((rgb(images, 8) - 0.5) / 0.5).logits, wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    net.eval().save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def detector_folder(folder: Path, things: torch.Tensor) -> Path:
    """A transformers folder of YOLOS, trained a little to tell images (n, C, H, W) of things from blank ones."""
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    from evaluators.external import rgb

    torch.manual_seed(0)
    size = {"height": 16, "width": 16}
    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[16, 16],
        patch_size=4,
        num_detection_tokens=3,
        id2label={0: "thing"},
        label2id={"thing": 0},
        use_mid_position_embeddings=False,
    )
    net, processor = YolosForObjectDetection(config), YolosImageProcessor(size=size, do_pad=False)
    processor.save_pretrained(folder)
    blank = torch.rand(len(things), 1, 1, 1).expand_as(things) * 2 - 1
    frames = (rgb(torch.cat([things, blank])) * 255).round().to(torch.uint8)
    inputs = processor(images=frames, return_tensors="pt", input_data_format="channels_first")
    # the first token detects the thing; class 1 means nothing
    wanted = torch.tensor([[0, 1, 1]] * len(things) + [[1, 1, 1]] * len(things))
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(200):
        loss = torch.nn.functional.cross_entropy(net(**inputs).logits.flatten(0, 1), wanted.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    net.eval().save_pretrained(folder)
    return folder


def sscd_file(path: Path) -> Path:
    """A TorchScript file: images (n, 3, 320, 320) -> descriptors (n, d), here the centred pixels of a small copy."""

    class Descriptor(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            small = torch.nn.functional.adaptive_avg_pool2d(x, [6, 6]).flatten(1)
            return self.scale * (small - small.mean(1, keepdim=True))

    torch.jit.script(Descriptor()).save(str(path))
    return path


def inception_file(path: Path) -> Path:
    """torch-fidelity's Inception v3 with random weights, in the format of its release."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: object, **__: object) -> None: ...

    torch.save({}, path)
    torch.manual_seed(0)
    net = Blank("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(net.state_dict(), path)
    return path
