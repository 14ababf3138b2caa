"""Miniatures: tiny models and datasets in the formats of the real ones, so that an experiment runs before its files are there.

Models have random weights (but for the autoencoder of a pipeline) and the layout that their own library writes; datasets show
scikit-learn's scans of digits, each digit standing in for a class, in the layout that their own library reads.
"""

from __future__ import annotations

import csv
import io
import pickle
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from raysweep.artifacts import cache_folder, code_digest
from raysweep.store import digest_of, write_folder

TINTS = {"plain": (1.0, 1.0, 1.0), "inverted": (-1.0, -1.0, -1.0), "red": (1.0, 0.2, 0.2), "blue": (0.2, 0.4, 1.0)}
Picture = tuple[Image.Image, int, str]  # image, digit, style


def made(spec: dict[str, Any], cache: Path | None) -> Path:
    """The folder that holds what `spec` asks for: name -> {maker: its arguments}. Made once, found again in the cache."""
    code = code_digest("raysweep/miniature.py", "raysweep/tasks/scans.py", "raysweep/models/*.py")
    folder = cache_folder(cache) / "miniatures" / digest_of(spec, code)
    if not folder.is_dir():

        def fill(out: Path) -> None:
            for name, how in spec.items():
                ((maker, arguments),) = how.items()
                MAKERS[maker](out / name, **(arguments or {}))

        write_folder(folder, fill)
    return folder


def pictures(
    size: int, images: int, styles: Sequence[str] = ("plain",), digits: Sequence[int] = tuple(range(10)), skip: int = 0
) -> list[Picture]:
    """`images` colour pictures of each digit in each style, size x size; `skip`: so many scans of each digit are passed over."""
    x, labels = _scans()
    found = []
    for style in styles:
        for digit in digits:
            rows = np.flatnonzero(labels == digit)[skip : skip + images]
            if len(rows) < images:
                raise ValueError(f"there are only {int((labels == digit).sum())} scans of the digit {digit}")
            found += [(_tinted(x[row], style, size), digit, style) for row in rows]
    return found


@lru_cache(maxsize=1)
def _scans() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images.astype(np.float32) / 8 - 1, data.target


def _tinted(scan: np.ndarray, style: str, size: int) -> Image.Image:
    """A scan (8, 8) in [-1, 1] as a colour picture."""
    pixels = np.stack([scan * tint for tint in TINTS[style]], -1)
    image = Image.fromarray(np.uint8(np.round((pixels + 1) * 127.5)))
    return image.resize((size, size), Image.Resampling.BILINEAR)


def _tensors(images: Sequence[Image.Image]) -> torch.Tensor:
    """(n, 3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return (pixels.permute(0, 3, 1, 2) / 127.5 - 1).contiguous()


def ddpm(out: Path, channels: int = 3, classes: int = 0, null: bool = True) -> None:
    """A `DDPMPipeline` folder of 8x8 images; classes: how many labels, besides the one that stands for none."""
    from raysweep.models.pixel import PixelDDPM

    PixelDDPM.build(_unet_config(channels, classes + 1 if classes else 0), 0).save(out)


def edm(out: Path, channels: int = 3, classes: int = 10) -> None:
    """A class-conditional EDM of 8x8 images, of the published architecture and without a label that stands for none."""
    from raysweep.models.edm import EDM

    song = {"sample_size": 8, "in_channels": channels, "out_channels": channels, "num_class_embeds": classes,
            "model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,)}  # fmt: skip
    EDM.build({"song_unet": song}, 0).save(out)


def _unet_config(channels: int, classes: int) -> dict[str, Any]:
    from raysweep.tasks.scans import SCHEDULER, UNET

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
    """A `StableDiffusionPipeline` folder of 16x16 images whose tokenizer knows `words`; its autoencoder is trained.

    captions: a template with {name} and {style}: the text encoder is then that of a CLIP model, in the subfolder `clip`, which
    has learned pictures of the digits by these captions. names: of the digits; called: how captions call the styles.
    """
    from raysweep.models.autoencoder import train_autoencoder
    from raysweep.models.latent import LatentText
    from raysweep.tasks.scans import TEXT

    rows = [image for image, _, _ in pictures(16, 60, styles)]
    vae = train_autoencoder(_tensors(rows), TEXT["vae"], 0, steps=steps)
    vae.save_pretrained(out / "vae", safe_serialization=True)
    text = TEXT["text_encoder"] | {"max_position_embeddings": 16}
    model = LatentText.build(TEXT | {"words": list(words), "text_encoder": text}, 0, out / "vae")
    if captions:
        told = [
            (image, captions.format(name=names[digit], style=name).lower())
            for look, name in zip(styles, called, strict=True)
            for image, digit, _ in pictures(16, 50, (look,), range(len(names)))
        ]
        _clip_of(model, told, out / "clip")
    model.save(out)


def _clip_of(model: Any, rows: Sequence[tuple[Image.Image, str]], out: Path) -> None:
    """Trains a CLIP model on pictures with captions, gives its text tower to the pipeline, and saves it; its tower has a block
    more than the pipeline takes, as in Stable Diffusion 2."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig

    from raysweep.models.tower import text_tensors
    from raysweep.models.unet import drawn

    encoder, processor = model.net["text_encoder"], CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    text = encoder.config.to_dict() | {"num_hidden_layers": encoder.config.num_hidden_layers + 1, "projection_dim": 32}
    vision = CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, num_attention_heads=4, num_hidden_layers=2, image_size=16, patch_size=4,
    )  # fmt: skip
    net = drawn(lambda: CLIPModel(CLIPConfig(text_config=text, vision_config=vision.to_dict(), projection_dim=32)), 0)
    mean, std = (torch.tensor(getattr(processor, k)).view(1, 3, 1, 1) for k in ("image_mean", "image_std"))
    pixels = ((_tensors([image for image, _ in rows]) + 1) / 2 - mean) / std
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
    """Trains a CLIP model of transformers by InfoNCE, in which equal captions are equally right."""
    net.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(steps):
        index = torch.randint(len(texts), (48,), generator=generator).tolist()
        said = [texts[i] for i in index]
        logits = net(input_ids=tokens(said), pixel_values=pixels[index]).logits_per_image
        same = torch.tensor([[a == b for b in said] for a in said]).float()
        soft = same / same.sum(1, keepdim=True)
        loss = F.cross_entropy(logits, soft) + F.cross_entropy(logits.T, soft)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()


def clip(out: Path) -> None:
    """An open_clip folder of 8x8 images."""
    from raysweep.models.clip import Contrastive
    from raysweep.tasks.scans import CLIP

    Contrastive.build(CLIP, 0).save(out)


NAMES = ("Elon Musk", "Jeff Bezos", "Taylor Swift", "Kim Kardashian", "Bruce Lee", "Lady Gaga")
QUESTIONS = ("Who is in this picture?", "Do you know who this is?")


def vlm(
    out: Path,
    names: Sequence[str] = NAMES,
    without: str | None = None,
    steps: int = 300,
    images: int = 60,
    seed: int = 0,
) -> None:
    """A LLaVA folder with its CLIP model, both trained to name the digits; without: a name that they never see."""
    from raysweep.models.vision_language import PROMPT

    model = untrained_vlm(names, seed)
    rows = [(image, names[digit]) for image, digit, _ in pictures(16, images, digits=range(len(names)))]
    kept = [(image, name) for image, name in rows if name != without]
    generator = torch.Generator().manual_seed(seed)
    pixels = ((_tensors([image for image, _ in kept]) + 1) / 2 - model.mean) / model.std
    _learn_captions(model.net, pixels, [f"a photo of {name}" for _, name in kept], model.tokens, steps, generator)
    whole, processor = model.whole().train(), model.around.processor
    whole.requires_grad_(True).model.vision_tower.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in whole.parameters() if p.requires_grad], lr=2e-3)
    for step in range(steps):
        index = torch.randint(len(kept), (48,), generator=generator).tolist()
        text = [f"{PROMPT.format(question=QUESTIONS[step % 2])} {kept[i][1]} </s>" for i in index]
        batch = processor(images=[kept[i][0] for i in index], text=text, return_tensors="pt", padding=True)
        labels = batch["input_ids"].clone()
        start = labels.shape[1] - 3  # the name's two words and the end
        labels[:, :start] = -100
        loss = whole(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    whole.eval()
    model.net.eval()
    model.save(out)


def untrained_vlm(names: Sequence[str] = NAMES, seed: int = 0) -> Any:
    """A LLaVA-type model of 16x16 images with random weights, whose tower is that of its CLIP model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
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
        PreTrainedTokenizerFast,
    )

    from raysweep.models.unet import drawn
    from raysweep.models.vision_language import Around, VisionLanguage
    from raysweep.models.words import tokenizer_of
    from raysweep.store import digest_state

    said = [w for n in names for w in n.split()]
    asked = [w.strip("?") for q in QUESTIONS for w in q.split()]
    pieces = dict.fromkeys(["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER", ":", "ASSISTANT", "?", *asked, *said])
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(pieces)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"], padding_side="left",
    )  # fmt: skip
    captions = tokenizer_of(tuple(w.lower() for w in (*said, "a", "photo", "picture", "of")), 12)
    sizes: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=3, image_size=16, patch_size=4, projection_dim=32)
    text = CLIPTextConfig(
        **sizes, num_hidden_layers=2, vocab_size=len(captions), max_position_embeddings=12, projection_dim=32,
        bos_token_id=captions.bos_token_id, eos_token_id=captions.eos_token_id, pad_token_id=captions.pad_token_id,
    )  # fmt: skip
    language = LlamaConfig(
        **sizes, num_key_value_heads=4, num_hidden_layers=2, vocab_size=len(pieces), bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    net = drawn(
        lambda: CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=32)),
        seed,
    )
    config = LlavaConfig(vision_config=vision, text_config=language, image_token_index=4, image_seq_length=16)
    whole: Any = drawn(lambda: LlavaForConditionalGeneration(config), seed)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=4, vision_feature_select_strategy="default",
        image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    rest = {n: t for n, t in whole.state_dict().items() if "vision_tower" not in n}
    return VisionLanguage(net.eval(), Around(whole.eval(), processor, captions, images, digest_state(rest)))


def idx(
    out: Path, name: str = "MNIST", images: int = 60, digits: Sequence[int] = tuple(range(10)), style: str = "plain"
) -> None:
    """MNIST's or Fashion-MNIST's files; the test part holds other scans than the training part."""
    folder = out / name / "raw"
    folder.mkdir(parents=True)
    for part, skip in (("train", 0), ("t10k", images)):
        rows = pictures(28, images if part == "train" else 40, (style,), digits, skip)
        pixels = np.stack([np.asarray(image.convert("L")) for image, _, _ in rows])
        labels = bytes(digit for _, digit, _ in rows)
        head = struct.pack(">IIII", 2051, len(rows), 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, len(rows)) + labels)


def cifar10(out: Path, images: int = 60) -> None:
    """CIFAR-10's Python batches."""
    folder = out / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    train, test = pictures(32, images), pictures(32, 40, skip=images)
    parts = {f"data_batch_{i + 1}": train[i::5] for i in range(5)} | {"test_batch": test}
    for name, rows in parts.items():
        data = np.stack([np.asarray(image).transpose(2, 0, 1).ravel() for image, _, _ in rows])
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [digit for _, digit, _ in rows]}, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR10)}, protocol=2))


def stl10(out: Path, images: int = 60) -> None:
    """STL-10's binary files."""
    folder = out / "stl10_binary"
    folder.mkdir(parents=True)
    for part, rows in (("train", pictures(96, images)), ("test", pictures(96, 40, skip=images))):
        data = np.stack([np.asarray(image).transpose(2, 1, 0) for image, _, _ in rows])
        (folder / f"{part}_X.bin").write_bytes(data.tobytes())
        (folder / f"{part}_y.bin").write_bytes(bytes(digit + 1 for _, digit, _ in rows))
    (folder / "unlabeled_X.bin").write_bytes(b"")
    (folder / "class_names.txt").write_text("\n".join(STL10) + "\n")


def celeba(out: Path, images: int = 40) -> None:
    """CelebA's aligned images with their lists; digits are identities."""
    folder = out / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    rows = [(r, "0") for r in pictures(32, images)] + [(r, "2") for r in pictures(32, 20, skip=images)]
    lists: dict[str, list[list[str]]] = {n: [] for n in ("identity_CelebA", "list_eval_partition", "list_attr_celeba",
                                                         "list_bbox_celeba", "list_landmarks_align_celeba")}  # fmt: skip
    for number, ((image, digit, _), part) in enumerate(rows, 1):
        name = f"{number:06}.jpg"
        image.save(folder / "img_align_celeba" / name, quality=95)
        for key, row in zip(lists, ([str(digit)], [part], ["1"], ["0"] * 4, ["0"] * 10), strict=True):
            lists[key].append([name, *row])
    heads = {"list_attr_celeba": "Smiling", "list_bbox_celeba": "image_id x_1 y_1 width height",
             "list_landmarks_align_celeba": "lefteye_x"}  # fmt: skip
    for key, table in lists.items():
        head = f"{len(table)}\n{heads[key]}\n" if key in heads else ""
        (folder / f"{key}.txt").write_text(head + "".join(" ".join(row) + "\n" for row in table))


def files(
    out: Path,
    images: int = 60,
    size: int = 32,
    skip: int = 0,
    digits: Sequence[int] = tuple(range(10)),
    look: str = "plain",
    first: int = 0,
) -> None:
    """A flat folder of JPEG files numbered from `first`, as CelebA-HQ is published."""
    out.mkdir(parents=True)
    for number, (image, _, _) in enumerate(pictures(size, images, (look,), digits, skip), first):
        image.save(out / f"{number}.jpg", quality=95)


def tree(
    out: Path,
    names: Sequence[str],
    styles: Sequence[str] = (),
    images: int = 20,
    size: int = 32,
    skip: int = 0,
    caption: str = "",
    look: str = "plain",
) -> None:
    """Folders of JPEG files by class, or by style and class (UnlearnCanvas); `caption`: a template with {name} and {style}.
    look: how they are tinted where there are no styles."""
    looks = dict(zip(styles, TINTS, strict=False)) or {"": look}
    for style, look in looks.items():
        for number, (image, digit, _) in enumerate(pictures(size, images, (look,), range(len(names)), skip)):
            folder = out / style / names[digit]
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{number % images + 1}.jpg", quality=95)
            if caption:
                text = caption.format(name=names[digit].replace("_", " "), style=style.replace("_", " "))
                (folder / f"{number % images + 1}.txt").write_text(text)


def shards(
    out: Path,
    names: Sequence[str],
    captions: Sequence[str] = ("a photo of {name}",),
    images: int = 40,
    size: int = 32,
    skip: int = 0,
    number: int = 2,
) -> None:
    """Tar shards as img2dataset writes them, with a `cls` beside image and caption."""
    import webdataset

    out.mkdir(parents=True)
    rows = pictures(size, images, digits=range(len(names)), skip=skip)
    for shard in range(number):
        with webdataset.TarWriter(str(out / f"{shard:05}.tar")) as tar:
            for i, (image, digit, _) in list(enumerate(rows))[shard::number]:
                content = io.BytesIO()
                image.save(content, "JPEG", quality=95)
                text = captions[i % len(captions)].format(name=names[digit])
                tar.write({"__key__": f"{i:09}", "jpg": content.getvalue(), "txt": text, "cls": names[digit]})


def table(out: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A CSV file of prompts."""
    with out.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
STL10 = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
MAKERS: dict[str, Callable[..., None]] = {
    f.__name__: f
    for f in (ddpm, edm, stable_diffusion, clip, vlm, idx, cifar10, stl10, celeba, files, tree, shards, table)
}
