"""Altered copies of a subject: fine-tuned, changed weight by weight, or with embeddings optimised for an attack."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from evaluators.base import Images, Inapplicable, Subject

IMAGES = 10  # forgotten images that an attacker has, at most
BATCH = 32
LR = 3e-4
EMBEDDING_LR = 0.1


def fine_tuned(subject: Subject, images: Images, steps: Sequence[int], stream: str) -> dict[int, Subject]:
    """Copies of the subject after each number of Adam steps in `steps`, rate 3e-4, on batches of 32 of `images`.

    stream: name of the seeds of noises and timesteps.
    """
    model, images, copies = copied(subject.model), subject.inputs(images), {}
    model.net.train()
    optimizer = torch.optim.Adam(model.net.parameters(), lr=LR)
    for step in range(max(steps) + 1):
        if step in steps:
            copies[step] = subject.with_model(copied(model))
        if step < max(steps):
            _training_step(subject, model, images, step, stream, optimizer)
    return copies


def inverted(subject: Subject, steps: int) -> Subject:
    """A copy whose embeddings of the forgotten class were optimised on at most 10 forgotten images, the network frozen.

    Raises Inapplicable if the network has no table of embeddings, or no row of it belongs only to the forgotten class.
    """
    model = copied(subject.model)
    images = subject.task.splits["forget"].distinct()
    images = subject.inputs(images.take(torch.arange(min(IMAGES, len(images)))))
    model.net.requires_grad_(False)
    tables = []
    for table, columns in _embedding_tables(model):
        mask = torch.zeros_like(table.weight)
        mask[_embedding_rows(subject, columns)] = 1.0
        tables.append(table)
        table.weight.requires_grad_(True)
        table.weight.register_hook(mask.mul)
    optimizer = torch.optim.Adam([table.weight for table in tables], lr=EMBEDDING_LR)
    for step in range(steps):
        _training_step(subject, model, images, step, "inversion", optimizer)
    return subject.with_model(model)


def changed(subject: Subject, change: Callable[[torch.Tensor], torch.Tensor]) -> Subject:
    """A copy of the subject with every weight of two or more dimensions replaced by `change` of it."""
    model = copied(subject.model)
    with torch.no_grad():
        for w in model.net.parameters():
            if w.dim() > 1:
                w.copy_(change(w))
    return subject.with_model(model)


def interpolated(subject: Subject, other: dict[str, torch.Tensor], share: float) -> Subject:
    """A copy of the subject with every weight moved by `share` of the way to `other`, weights by name."""
    model = copied(subject.model)
    with torch.no_grad():
        for name, w in model.net.named_parameters():
            w.lerp_(other[name].to(w), share)
    return subject.with_model(model)


def quantised(w: torch.Tensor, bits: int) -> torch.Tensor:
    """w rounded to 2^bits - 1 levels between plus and minus the largest magnitude of each output channel."""
    top = 2 ** (bits - 1) - 1
    scale = w.abs().flatten(1).amax(1).clamp(min=1e-12).view(-1, *[1] * (w.dim() - 1)) / top
    return (w / scale).round().clamp(-top, top) * scale


def copied(model: Any) -> Any:
    """A model with a network of its own, whose weights may change."""
    other = copy.copy(model)
    other.net = copy.deepcopy(model.net)
    return other


def text_encoders(net: Any) -> list[Any]:
    """The text encoders of a network, in the order in which a prompt's tokens belong to them; [] if it has none."""
    return [m for n, m in net.items() if n.startswith("text_encoder")] if isinstance(net, torch.nn.ModuleDict) else []


def _embedding_tables(model: Any) -> list[tuple[torch.nn.Embedding, slice]]:
    """The tables through which conditions enter the network, of its classes or of the tokens of its text encoders, and each
    encoder's columns of a row of tokens."""
    net: Any = model.net
    if isinstance(net, torch.nn.ModuleDict):
        encoders: dict[str, Any] = dict(net.items())
        return [(encoders[name].get_input_embeddings(), columns) for name, columns in model.columns.items()]
    embedding = getattr(net, "class_embedding", None)
    if not isinstance(embedding, torch.nn.Embedding):
        raise Inapplicable("the network has no table of class embeddings to search in")
    return [(embedding, slice(None))]


def _embedding_rows(subject: Subject, columns: slice) -> torch.Tensor:
    """The rows of a table that belong only to the forgotten class."""
    task = subject.task
    if task.kind != "concept":
        return subject.forgotten(1)
    prompts = task.splits[f"prompts_{subject.sizes['judge']}"]
    forgotten = prompts.groups == task.forget_class
    tokens = torch.unique(prompts.cond[forgotten][:, columns])
    tokens = tokens[~torch.isin(tokens, torch.unique(prompts.cond[~forgotten][:, columns]))]
    if not len(tokens):
        raise Inapplicable("no token occurs only in prompts of the forgotten class")
    return tokens


def _training_step(
    subject: Subject, model: Any, images: Any, step: int, stream: str, optimizer: torch.optim.Optimizer
) -> None:
    """One step on the training objective of the subject's family, on rows and seeds of its own."""
    rows = (torch.arange(BATCH) + step * BATCH) % len(images)
    if subject.task.model_kind == "contrastive":
        loss = _class_loss(subject, model, images.x[rows].to(model.device, model.dtype), images.groups[rows])
    else:
        seeds = subject.seeds(stream, BATCH * (step + 1))[step * BATCH :]
        loss = denoising_loss(model, images.x[rows], None if images.cond is None else images.cond[rows], seeds)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def denoising_loss(model: Any, x0: torch.Tensor, cond: torch.Tensor | None, seeds: torch.Tensor) -> torch.Tensor:
    """The training loss of x0 (n, C, H, W), as the network takes them, under their conditions; row i's step and noise are by seeds[i]."""
    t = (model.uniform(seeds, 1)[:, 0] * len(model.alphas)).long()
    eps = model.noise(seeds)
    x0, cond = x0.to(eps), None if cond is None else cond.to(eps.device)
    output = model.predict(model.add_noise(x0, eps, t), t, cond)
    return (output - model.target(x0, eps, t)).square().mean()


def _class_loss(subject: Subject, model: Any, x: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of images with the search's prompts, one per class: contrastive fine-tuning towards class texts."""
    prompts = subject.task.splits["prompts_probe"]
    first = torch.tensor([prompts.groups.tolist().index(c) for c in range(int(prompts.groups.max()) + 1)])
    texts = F.normalize(model.encode_text(prompts.cond[first].to(model.device)), dim=-1)
    logits = model.logit_scale * F.normalize(model.encode_image(x), dim=-1) @ texts.T
    return F.cross_entropy(logits, classes.to(model.device))
