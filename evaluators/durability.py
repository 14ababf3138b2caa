"""Ways to bring the forgotten thing back, and how much of it comes back.

The presence of a class is the share of samples under its label in which the judge sees it; that of an image, the
correlation with it of what the model rebuilds from a noised copy (both between 0 and 1, on the same seeds before and
after an attack). A presence after an attack means nothing by itself: an oracle that never saw the thing can be taught it,
too. Every attack is therefore made on the oracles with the same seeds, and what counts is

    excess   presence after the attack minus the oracles' mean after the same attack
    none     the presence of a fresh set of seeds without any attack, the null that each attack has to beat

More than the oracle is concealment; less is damage, not safety.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from evaluators.base import (
    Direction,
    Evaluator,
    Inapplicable,
    Metric,
    Scores,
    Subject,
    correlation,
    judged,
)
from evaluators.contrast import zero_shot
from evaluators.statistics import clopper_pearson, jackknife_interval, t_interval

EVERY = frozenset({"diffusion", "contrastive"})
IMAGES = 10  # that an attacker has, at most
BATCH = 32
LR = 3e-4
NONE = "none"

Attacked = Callable[[Subject], np.ndarray]


class Durability(Evaluator):
    """An attack in one or several strengths; `attacks` makes them."""

    directions: ClassVar[dict[str, Direction]] = {"presence": "target", "excess": "target"}
    needs = "forget set; `excess` needs oracles"

    @abstractmethod
    def attacks(self, subject: Subject) -> dict[str, Attacked]:
        """Strength -> presence per unit (n,) after the attack, for any subject; raises Inapplicable."""

    def scores(self, subject: Subject) -> Scores:
        oracles, found = subject.oracles(), {NONE: plain(subject)}
        if oracles:
            found[f"oracles.{NONE}"] = np.stack([plain(o) for o in oracles], 1)
        for strength, attack in self.attacks(subject).items():
            found[strength] = self._once(subject, strength, attack)
            if oracles:
                found[f"oracles.{strength}"] = np.stack([self._once(o, strength, attack) for o in oracles], 1)
        return found

    def _once(self, subject: Subject, strength: str, attack: Attacked) -> np.ndarray:
        return subject.once(f"{self.name}.{strength}", lambda: attack(subject))

    def values(self, scores: Scores, subject: Subject) -> dict[str, float]:
        strengths = [s for s in scores if s != NONE and not s.startswith("oracles.")]
        found = {f"presence@{s}": float(scores[s].mean()) for s in (NONE, *strengths)}
        found["presence"] = float(np.mean([found[f"presence@{s}"] for s in strengths]))
        if f"oracles.{NONE}" in scores:
            for s in (NONE, *strengths):
                found[f"excess@{s}"] = float(scores[s].mean() - scores[f"oracles.{s}"].mean())
            found["excess"] = float(np.mean([found[f"excess@{s}"] for s in strengths]))
        return found

    def rows(self, scores: Scores, subject: Subject, replicates: dict[str, np.ndarray]) -> list[Metric]:
        rows, values = [], self.values(scores, subject)
        units = {name: len(scores[name]) for name in scores}
        for name, value in values.items():
            kind, _, strength = name.partition("@")
            n = units[strength or NONE]
            if kind == "presence" and strength and subject.classed:
                hits = round(value * n)
                lo, hi = clopper_pearson(hits, n)
                rows.append(Metric(name, value, n, None, lo, hi, "clopper-pearson"))
            elif kind == "presence" and strength:
                se, lo, hi = t_interval(scores[strength])
                rows.append(Metric(name, value, n, se, lo, hi, "student-t over noise draws"))
            else:
                # an excess holds what the oracles' own spread leaves open about their mean, too
                more = _spread(scores, strength) if kind == "excess" else 0.0
                se, lo, hi = jackknife_interval(value, replicates[name], more=more)
                rows.append(Metric(name, value, n, se, lo, hi, "jackknife over samples"))
        if "excess" not in values:
            why = "there is no oracle to compare with"
            rows.append(Metric("excess", None, 0, status="skipped", reason=why))
        return rows


class Relearning(Durability):
    """Fine-tuning on at most 10 forgotten images; after Suriyakumar et al., arXiv:2410.08074."""

    model_kinds = EVERY
    name = "relearning"
    cost = "the largest of `relearn_steps` optimiser steps of 32 rows, then samples, per strength"
    split: ClassVar[str] = "forget"
    limit: ClassVar[int | None] = IMAGES

    def attacks(self, subject: Subject) -> dict[str, Attacked]:
        def taught(steps: int, s: Subject) -> np.ndarray:
            return presence(self._taught(s)[steps])

        return {f"{steps} steps": partial(taught, steps) for steps in subject.sizes["relearn_steps"]}

    def _taught(self, subject: Subject) -> dict[int, Subject]:
        images = subject.task.splits[self.split].distinct()
        if self.limit is not None:
            images = images.take(torch.arange(min(self.limit, len(images))))
        grid = subject.sizes["relearn_steps"]
        return subject.once(f"{self.name}.taught", lambda: fine_tuned(subject, images, grid, self.name))


class FineTuning(Relearning):
    """Benign fine-tuning on retained images, without the forgotten ones; arXiv:2410.08074 (concept resurgence)."""

    name = "finetuning"
    needs = "forget and retain sets; `excess` needs oracles"
    split = "retain"
    limit = None


class Quantisation(Durability):
    """Weights rounded to int8 and int4 and back, symmetric, one scale per output channel, round to nearest."""

    model_kinds = EVERY
    name = "quantisation"
    cost = "samples, per width"

    def attacks(self, subject: Subject) -> dict[str, Attacked]:
        def rounded(bits: int, s: Subject) -> np.ndarray:
            return presence(changed(s, lambda w: quantised(w, bits)))

        return {f"int{bits}": partial(rounded, bits) for bits in (8, 4)}


class WeightNoise(Durability):
    """Gaussian noise on every tensor, in parts of its root mean square."""

    model_kinds = EVERY
    name = "weight_noise"
    cost = "samples, per strength"

    def attacks(self, subject: Subject) -> dict[str, Attacked]:
        def shaken(strength: float, s: Subject) -> np.ndarray:
            generator = torch.Generator().manual_seed(int(s.seeds("weight noise", 1)[0]) % 2**31)

            def noisy(w: torch.Tensor) -> torch.Tensor:
                noise = torch.randn(w.shape, generator=generator, dtype=torch.float64).to(w)
                return w + strength * w.square().mean().sqrt() * noise

            return presence(changed(s, noisy))

        return {f"{strength:g}": partial(shaken, strength) for strength in (0.02, 0.05, 0.1)}


class LatentNoise(Durability):
    """Stochastic sampling, and larger noise to start from; after "When Are Concepts Erased From Diffusion Models?"."""

    name = "latent_noise"
    kinds = frozenset({"class", "concept"})
    cost = "samples, per strength"

    def attacks(self, subject: Subject) -> dict[str, Attacked]:
        return {
            "eta 1": partial(presence, eta=1.0),
            "noise x1.1": partial(presence, noise_scale=1.1),
            "noise x1.25": partial(presence, noise_scale=1.25),
        }


class PartialDiffusion(Durability):
    """Denoising under the forgotten label from noised copies of real images of it; after arXiv:2409.05668."""

    name = "partial_diffusion"
    kinds = frozenset({"class", "concept"})
    cost = "`class_samples` reconstructions per strength"

    def attacks(self, subject: Subject) -> dict[str, Attacked]:
        def recalled(share: float, s: Subject) -> np.ndarray:
            images, n = s.task.splits["forget"].distinct(), s.sizes["class_samples"]
            index, seeds = torch.arange(n) % len(images), s.seeds("partial diffusion", n)
            t, steps = int(share * len(s.model.alphas)), max(1, round(share * s.task.sampling["steps"]))

            mine = images.take(index)
            return _seen(s, s.reconstruct(mine.x, seeds, t, steps, mine.cond))

        return {f"from {share:g} T": partial(recalled, share) for share in (0.5, 0.7, 0.9)}


class Inversion(Durability):
    """A class embedding optimised on at most 10 forgotten images with the network frozen, in place of the forgotten one; for
    a text model the embeddings of those tokens that only prompts of the forgotten thing hold. After Gal et al.,
    arXiv:2208.01618, and Pham et al., arXiv:2308.01508."""

    name = "inversion"
    kinds = frozenset({"class", "concept"})
    cost = "`inversion_steps` optimiser steps of 32 rows on one embedding, then samples"

    def attacks(self, subject: Subject) -> dict[str, Attacked]:
        def inverted(s: Subject) -> np.ndarray:
            model = _copied(s.model)
            images = s.task.splits["forget"].distinct()
            images = s.inputs(images.take(torch.arange(min(IMAGES, len(images)))))
            model.net.requires_grad_(False)
            tables = _tables(model.net)
            rows = _own_rows(s)
            for table in tables:
                mask = torch.zeros_like(table.weight)
                mask[rows] = 1.0
                table.weight.requires_grad_(True)
                table.weight.register_hook(mask.mul)
            optimizer = torch.optim.Adam([table.weight for table in tables], lr=0.1)
            for step in range(s.sizes["inversion_steps"]):
                _denoising_step(s, model, images, step, "inversion", optimizer)
            return presence(replace(s, model=model, _cache={}))

        return {"embedding": inverted}


class Interpolation(Durability):
    """Weights moved a part of the way back to the base."""

    model_kinds = EVERY
    name = "interpolation"
    needs = "forget set and base; `excess` needs oracles"
    cost = "samples, per strength"

    def attacks(self, subject: Subject) -> dict[str, Attacked]:
        if "base" not in subject.peers:
            raise Inapplicable("there is no base to move towards")
        base = subject.peers["base"].model.net.state_dict()

        def moved(share: float, s: Subject) -> np.ndarray:
            model = _copied(s.model)
            with torch.no_grad():
                for name, w in model.net.named_parameters():
                    w.lerp_(base[name].to(w), share)
            return presence(replace(s, model=model, _cache={}))

        return {f"{share:g}": partial(moved, share) for share in (0.25, 0.5)}


class SamplerRemoval(Durability):
    """A candidate that forgets by its sampler, sampled as its base is."""

    name = "sampler_removal"
    cost = "samples"

    def attacks(self, subject: Subject) -> dict[str, Attacked]:
        if subject.model.sampler is None:
            raise Inapplicable("the model is sampled as its base is")
        return {"removed": lambda s: presence(replace(s, model=s.model.with_net(s.model.net), _cache={}))}


def _tables(net: Any) -> list[torch.nn.Embedding]:
    """Where conditions enter the network as rows of a table: its classes, or the tokens of its text encoders."""
    if isinstance(net, torch.nn.ModuleDict):
        encoders: list[Any] = [m for n, m in net.items() if n.startswith("text_encoder")]
        return [encoder.get_input_embeddings() for encoder in encoders]
    embedding = getattr(net, "class_embedding", None)
    if not isinstance(embedding, torch.nn.Embedding):
        raise Inapplicable("the network has no table of class embeddings to search in")
    return [embedding]


def _own_rows(subject: Subject) -> torch.Tensor:
    """The rows of those tables that stand for the forgotten thing alone."""
    task = subject.task
    if task.kind != "concept":
        return subject.forgotten(1)
    prompts = task.splits[f"prompts_{subject.sizes['judge']}"]
    mine = prompts.groups == task.forget_class
    own = torch.unique(prompts.cond[mine])
    own = own[~torch.isin(own, torch.unique(prompts.cond[~mine]))]
    if not len(own):
        raise Inapplicable("no token is found in prompts of the forgotten thing alone")
    return own


def presence(subject: Subject, stream: str = "durability", **sampling: Any) -> np.ndarray:
    """Presence of the forgotten thing per unit: 0 or 1 per sample of a class, correlation per draw of noise of an image, and
    for a contrastive model 0 or 1 per real image of the class."""
    if subject.task.model_kind == "contrastive":
        split = subject.task.splits[f"judge_{subject.sizes['judge']}"]
        mine = split.take((split.groups == subject.task.forget_class).nonzero()[:, 0])
        return (zero_shot(subject, mine).argmax(1) == subject.task.forget_class).astype(float)
    if subject.classed:
        cond = subject.forgotten(subject.sizes["class_samples"])
        return _seen(subject, subject.generate(cond, subject.seeds(stream, len(cond)), **sampling))
    images, seeds = subject.task.splits["forget"].distinct(), subject.seeds(stream, subject.sizes["noises"])
    columns = [correlation(*subject.rebuilt(images, i, seeds)) for i in range(len(images))]
    return torch.stack(columns, 1).mean(1).numpy()


def plain(subject: Subject) -> np.ndarray:
    """Presence without any attack, on the seeds that the attacks use."""
    return subject.once("durability.none", lambda: presence(subject))


def fine_tuned(subject: Subject, images: Any, grid: tuple[int, ...], stream: str) -> dict[int, Subject]:
    """Copies of the subject after each number of Adam steps in `grid`, rate 3e-4, batches of 32 of `images`."""
    model, images, found = _copied(subject.model), subject.inputs(images), {}
    model.net.train()
    optimizer = torch.optim.Adam(model.net.parameters(), lr=LR)
    for step in range(max(grid) + 1):
        if step in grid:
            found[step] = replace(subject, model=_copied(model), _cache={})
        if step < max(grid):
            _denoising_step(subject, model, images, step, stream, optimizer)
    return found


def changed(subject: Subject, change: Callable[[torch.Tensor], torch.Tensor]) -> Subject:
    """The subject with every weight of two or more dimensions put through `change`."""
    model = _copied(subject.model)
    with torch.no_grad():
        for w in model.net.parameters():
            if w.dim() > 1:
                w.copy_(change(w))
    return replace(subject, model=model, _cache={})


def quantised(w: torch.Tensor, bits: int) -> torch.Tensor:
    """w rounded to 2^bits - 1 levels between plus and minus the largest magnitude of each output channel."""
    top = 2 ** (bits - 1) - 1
    scale = w.abs().flatten(1).amax(1).clamp(min=1e-12).view(-1, *[1] * (w.dim() - 1)) / top
    return (w / scale).round().clamp(-top, top) * scale


def _denoising_step(
    subject: Subject, model: Any, images: Any, step: int, stream: str, optimizer: torch.optim.Optimizer
) -> None:
    mine = subject.seeds(stream, BATCH * (step + 1))[step * BATCH :]
    rows = (torch.arange(BATCH) + step * BATCH) % len(images)
    if subject.task.model_kind == "contrastive":
        loss = _class_loss(subject, model, images.x[rows].to(model.device, model.dtype), images.groups[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return
    t = (model.uniform(mine, 1)[:, 0] * len(model.alphas)).long()
    eps = model.noise(mine)
    x0 = images.x[rows].to(eps)
    cond = None if images.cond is None else images.cond[rows].to(eps.device)
    output = model.predict(model.add_noise(x0, eps, t), t, cond)
    loss = (output - model.target(x0, eps, t)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _class_loss(subject: Subject, model: Any, x: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of images with the prompts of the search, one per class: contrastive fine-tuning towards class texts."""
    prompts = subject.task.splits["prompts_probe"]
    first = torch.tensor([prompts.groups.tolist().index(c) for c in range(int(prompts.groups.max()) + 1)])
    texts = F.normalize(model.encode_text(prompts.cond[first].to(model.device)), dim=-1)
    logits = model.logit_scale * F.normalize(model.encode_image(x), dim=-1) @ texts.T
    return F.cross_entropy(logits, classes.to(model.device))


def _seen(subject: Subject, images: torch.Tensor) -> np.ndarray:
    return (judged(subject.judge, images).argmax(1) == subject.task.forget_class).astype(float)


def _copied(model: Any) -> Any:
    other = copy.copy(model)
    other.net = copy.deepcopy(model.net)
    return other


def _spread(scores: Scores, strength: str) -> float:
    """Standard error of the oracles' mean presence from their own spread; 0 with a single oracle."""
    names = [f"oracles.{strength}"] if strength else [n for n in scores if n.startswith("oracles.") and n[8:] != NONE]
    means = np.mean([scores[n].mean(0) for n in names], axis=0)
    return float(np.std(means, ddof=1) / math.sqrt(len(means))) if len(means) > 1 else 0.0
