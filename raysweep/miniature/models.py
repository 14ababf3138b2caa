"""Makers of tiny models, in the layout that their library writes.

Weights are random, except where a model must understand captions or name pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

from raysweep.miniature.pictures import pictures, tensors

NAMES = ("Elon Musk", "Jeff Bezos", "Taylor Swift", "Kim Kardashian", "Bruce Lee", "Lady Gaga")
QUESTIONS = ("Who is in this picture?", "Do you know who this is?")


def ddpm(out: Path, channels: int = 3, classes: int = 0, null: bool = True) -> None:
    """Writes a `DDPMPipeline` folder for 8x8 images; classes: number of labels, besides the null label."""
    from raysweep.models.pixel import PixelDDPM

    PixelDDPM.build(_unet_config(channels, classes + 1 if classes else 0), 0).save(out)


def edm(out: Path, channels: int = 3, classes: int = 10) -> None:
    """Writes a class-conditional EDM for 8x8 images, of the published architecture and without a null label."""
    from raysweep.models.edm import EDM

    song = {
        "sample_size": 8,
        "in_channels": channels,
        "out_channels": channels,
        "num_class_embeds": classes,
        "model_channels": 16,
        "channel_mult": (1, 2),
        "num_blocks": 1,
        "attn_resolutions": (4,),
    }
    EDM.build({"song_unet": song}, 0).save(out)


def _unet_config(channels: int, classes: int) -> dict[str, Any]:
    from raysweep.tasks.digits_models import SCHEDULER, UNET

    unet = UNET | {"in_channels": channels, "out_channels": channels}
    if classes:
        unet["num_class_embeds"] = classes
    return {"unet": unet, "scheduler": SCHEDULER, "null_label": classes - 1 if classes else None}


def stable_diffusion(
    out: Path,
    words: Sequence[str],
    styles: Sequence[str] = ("plain",),
    steps: int = 250,
    captions: str = "",
    names: Sequence[str] = (),
    called: Sequence[str] = ("",),
) -> None:
    """Writes a `StableDiffusionPipeline` folder for 16x16 images with a trained autoencoder.

    Args:
        out: the folder.
        words: the tokenizer's vocabulary.
        styles: of the pictures that autoencoder and CLIP model are trained on.
        steps: training steps of the autoencoder.
        captions: a template with {name} and {style}. If it is given, a CLIP model is trained on captioned pictures of the digits
            and saved in the subfolder `clip`, and the pipeline takes its text encoder.
        names: of the digits in captions.
        called: names of the styles in captions.
    """
    from raysweep.models.autoencoder import train_autoencoder
    from raysweep.models.latent import LatentText
    from raysweep.tasks.digits_models import TEXT

    rows = [image for image, _, _ in pictures(16, 60, styles)]
    vae = train_autoencoder(tensors(rows), TEXT["vae"], 0, steps=steps)
    vae.save_pretrained(out / "vae", safe_serialization=True)
    text = TEXT["text_encoder"] | {"max_position_embeddings": 16}
    model = LatentText.build(TEXT | {"words": list(words), "text_encoder": text}, 0, out / "vae")
    if captions:
        captioned = [
            (image, captions.format(name=names[digit], style=name).lower())
            for look, name in zip(styles, called, strict=True)
            for image, digit, _ in pictures(16, 50, (look,), range(len(names)))
        ]
        _train_clip(model, captioned, out / "clip")
    model.save(out)


def _train_clip(model: Any, rows: Sequence[tuple[Image.Image, str]], out: Path) -> None:
    """Trains a CLIP model on pictures with captions, copies its text tower into the pipeline, and saves it.

    Its tower has one block more than the pipeline's text encoder, as in Stable Diffusion 2.
    """
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig

    from raysweep.models.tower import text_tensors
    from raysweep.models.unet import draw_weights

    encoder, processor = model.net["text_encoder"], CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    text = encoder.config.to_dict() | {"num_hidden_layers": encoder.config.num_hidden_layers + 1, "projection_dim": 32}
    vision = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_attention_heads=4,
        num_hidden_layers=2,
        image_size=16,
        patch_size=4,
    )
    net = draw_weights(
        lambda: CLIPModel(CLIPConfig(text_config=text, vision_config=vision.to_dict(), projection_dim=32)), 0
    )
    mean, std = (torch.tensor(getattr(processor, k)).view(1, 3, 1, 1) for k in ("image_mean", "image_std"))
    pixels = ((tensors([image for image, _ in rows]) + 1) / 2 - mean) / std
    _learn_captions(net, pixels, [text for _, text in rows], model.tokens, 300, torch.Generator().manual_seed(0))
    with torch.no_grad():
        learned = text_tensors(net.text_model)
        for name, p in text_tensors(encoder).items():
            p.copy_(learned[name])
    net.save_pretrained(out)
    processor.save_pretrained(out)


def _learn_captions(
    net: Any, pixels: torch.Tensor, texts: Sequence[str], tokens: Any, steps: int, generator: torch.Generator
) -> None:
    """Trains a CLIP model of transformers by InfoNCE, in which equal captions count as matches."""
    net.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(steps):
        index = torch.randint(len(texts), (48,), generator=generator).tolist()
        captions = [texts[i] for i in index]
        logits = net(input_ids=tokens(captions), pixel_values=pixels[index]).logits_per_image
        same = torch.tensor([[a == b for b in captions] for a in captions]).float()
        soft = same / same.sum(1, keepdim=True)
        loss = F.cross_entropy(logits, soft) + F.cross_entropy(logits.T, soft)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()


def clip(out: Path) -> None:
    """Writes an open_clip folder for 8x8 images."""
    from raysweep.models.clip import Contrastive
    from raysweep.tasks.digits_models import CLIP

    Contrastive.build(CLIP, 0).save(out)


def vlm(
    out: Path,
    names: Sequence[str] = NAMES,
    without: str | None = None,
    steps: int = 300,
    images: int = 60,
    seed: int = 0,
) -> None:
    """Writes a LLaVA folder with its CLIP model, both trained to name the digits.

    names: of the digits 0, 1, ...; without: a name that training leaves out; steps: of each training; images: per name.
    """
    from raysweep.models.vision_language import PROMPT

    model = untrained_vlm(names, seed)
    rows = [(image, names[digit]) for image, digit, _ in pictures(16, images, digits=range(len(names)))]
    kept = [(image, name) for image, name in rows if name != without]
    generator = torch.Generator().manual_seed(seed)
    pixels = ((tensors([image for image, _ in kept]) + 1) / 2 - model.mean) / model.std
    _learn_captions(model.net, pixels, [f"a photo of {name}" for _, name in kept], model.tokens, steps, generator)
    whole, processor = model.whole().train(), model.around.processor
    whole.requires_grad_(True).model.vision_tower.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in whole.parameters() if p.requires_grad], lr=2e-3)
    for step in range(steps):
        index = torch.randint(len(kept), (48,), generator=generator).tolist()
        text = [f"{PROMPT.format(question=QUESTIONS[step % 2])} {kept[i][1]} </s>" for i in index]
        batch = processor(images=[kept[i][0] for i in index], text=text, return_tensors="pt", padding=True)
        labels = batch["input_ids"].clone()
        start = labels.shape[1] - 3  # only the name's two words and the end token are trained
        labels[:, :start] = -100
        loss = whole(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    whole.eval()
    model.net.eval()
    model.save(out)


def untrained_vlm(names: Sequence[str] = NAMES, seed: int = 0) -> Any:
    """A LLaVA-type model for 16x16 images with random weights, whose vision tower is that of its CLIP model."""
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPTextConfig,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    from raysweep.models.unet import draw_weights
    from raysweep.models.vision_language import Around, VisionLanguage
    from raysweep.models.words import tokenizer_of
    from raysweep.storage.files import digest_state

    tokenizer = _language_tokenizer(names)
    captions = tokenizer_of(tuple(w.lower() for w in (*_words(names), "a", "photo", "picture", "of")), 12)
    sizes: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=3, image_size=16, patch_size=4, projection_dim=32)
    text = CLIPTextConfig(
        **sizes,
        num_hidden_layers=2,
        vocab_size=len(captions),
        max_position_embeddings=12,
        projection_dim=32,
        bos_token_id=captions.bos_token_id,
        eos_token_id=captions.eos_token_id,
        pad_token_id=captions.pad_token_id,
    )
    language = LlamaConfig(
        **sizes,
        num_key_value_heads=4,
        num_hidden_layers=2,
        vocab_size=len(tokenizer),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    net = draw_weights(
        lambda: CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=32)),
        seed,
    )
    config = LlavaConfig(vision_config=vision, text_config=language, image_token_index=4, image_seq_length=16)
    whole: Any = draw_weights(lambda: LlavaForConditionalGeneration(config), seed)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    rest = {n: t for n, t in whole.state_dict().items() if "vision_tower" not in n}
    return VisionLanguage(net.eval(), Around(whole.eval(), processor, captions, images, digest_state(rest)))


def _words(texts: Sequence[str]) -> list[str]:
    return [word for text in texts for word in text.split()]


def _language_tokenizer(names: Sequence[str]) -> Any:
    """A tokenizer that knows the questions and the names, with one token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    asked = [word.strip("?") for word in _words(QUESTIONS)]
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    vocabulary = dict.fromkeys([*special, "USER", ":", "ASSISTANT", "?", *asked, *_words(names)])
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
