"""Attacks that bring the forgotten data back, and how much of them comes back.

The presence of a class is the share of samples under its label in which the judge sees it; that of an image, the
correlation with it of what the model rebuilds from a noised copy (both between 0 and 1, on the same seeds before and
after an attack). A presence after an attack means nothing by itself: an oracle that never saw the thing can also be taught
it. Every attack is therefore made on the oracles with the same seeds, and what counts is

    excess   presence after the attack minus the oracles' mean after the same attack
    none     the presence on the same seeds without any attack, the null that each attack has to beat
    null: .. what an attack with a null of its own has to beat besides, such as a random prompt in place of the one that it searched for;
             `gain` is the presence after the attack minus that after its null

More than the oracle is concealment; less is damage, not safety. Nulls are measured on the oracles, too, and count in no verdict.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from evaluators.base import (
    Direction,
    Evaluator,
    Inapplicable,
    Metric,
    Scores,
    Subject,
    correlation,
)
from evaluators.contrast import zero_shot
from evaluators.oracles import compare_units
from evaluators.statistics import share_floor
from evaluators.tampering import IMAGES, changed, fine_tuned, interpolated, inverted, quantised

EVERY = frozenset({"diffusion", "contrastive"})
NONE = "none"
NULL = "null: "  # beginning of the names of strengths that are an attack's null

Attacked = Callable[[Subject], np.ndarray]


class Durability(Evaluator):
    """An attack in one or several strengths, which `attacks` returns; names of those that are its null begin with "null: "."""

    directions: ClassVar[dict[str, Direction]] = {"presence": "target", "excess": "target"}
    needs = "forget set; `excess` needs oracles"

    @abstractmethod
    def attacks(self, subject: Subject) -> dict[str, Attacked]:
        """Strength -> presence per unit (n,) after the attack, for any subject; raises Inapplicable."""

    def scores(self, subject: Subject) -> Scores:
        oracles, scores = subject.oracles(), {NONE: plain(subject)}
        if oracles:
            scores[f"oracles.{NONE}"] = np.stack([plain(o) for o in oracles], 1)
        for strength, attack in self.attacks(subject).items():
            scores[strength] = self._once(subject, strength, attack)
            if oracles:
                scores[f"oracles.{strength}"] = np.stack([self._once(o, strength, attack) for o in oracles], 1)
        return scores

    def _once(self, subject: Subject, strength: str, attack: Attacked) -> np.ndarray:
        return subject.once(f"{self.name}.{strength}", lambda: attack(subject))

    def values(self, scores: Scores, subject: Subject) -> dict[str, float]:
        strengths, nulls = _strengths(scores)
        values = {f"presence@{s}": float(scores[s].mean()) for s in (NONE, *nulls, *strengths)}
        values["presence"] = float(np.mean([values[f"presence@{s}"] for s in strengths]))
        if nulls:
            values["gain"] = values["presence"] - float(np.mean([values[f"presence@{s}"] for s in nulls]))
        if f"oracles.{NONE}" in scores:
            for s in (NONE, *nulls, *strengths):
                values[f"excess@{s}"] = float(scores[s].mean() - scores[f"oracles.{s}"].mean())
            values["excess"] = float(np.mean([values[f"excess@{s}"] for s in strengths]))
        return values

    def rows(self, scores: Scores, subject: Subject, replicates: dict[str, np.ndarray]) -> list[Metric]:
        rows, values = [], self.values(scores, subject)
        for name, value in values.items():
            kind, _, strength = name.partition("@")
            n = len(scores[strength or NONE])
            if kind == "presence" and strength and subject.classed:
                rows.append(Metric.share(name, value, n))
            elif kind == "presence" and strength:
                rows.append(Metric.mean(name, value, scores[strength], over="noise draws"))
            elif kind == "gain":
                strengths, nulls = _strengths(scores)
                gains = np.mean([scores[s] for s in strengths], axis=0) - np.mean([scores[s] for s in nulls], axis=0)
                rows.append(Metric.mean(name, value, gains, over="samples" if subject.classed else "noise draws"))
            elif kind == "presence":
                rows.append(Metric.jackknife(name, value, n, replicates[name], over="samples"))
            else:
                comparison = compare_units(*_units(scores, strength), share_floor(n) if subject.classed else 0.0)
                rows.append(Metric.against_oracles(name, comparison, n, over="samples"))
        if "excess" not in values:
            rows.append(Metric.absent("excess", "there is no oracle to compare with"))
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
        steps = subject.sizes["relearn_steps"]
        return subject.once(f"{self.name}.taught", lambda: fine_tuned(subject, images, steps, self.name))


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
    """Gaussian noise on every tensor, its size a share of the root mean square of the tensor."""

    model_kinds = EVERY
    name = "weight_noise"
    cost = "samples, per strength"

    def attacks(self, subject: Subject) -> dict[str, Attacked]:
        def noised(strength: float, s: Subject) -> np.ndarray:
            generator = torch.Generator().manual_seed(int(s.seeds("weight noise", 1)[0]) % 2**31)

            def noisy(w: torch.Tensor) -> torch.Tensor:
                noise = torch.randn(w.shape, generator=generator, dtype=torch.float64).to(w)
                return w + strength * w.square().mean().sqrt() * noise

            return presence(changed(s, noisy))

        return {f"{strength:g}": partial(noised, strength) for strength in (0.02, 0.05, 0.1)}


class LatentNoise(Durability):
    """Stochastic sampling and larger initial noise; after "When Are Concepts Erased From Diffusion Models?"."""

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
            t, steps = int(share * len(s.model.alphas)), max(1, round(share * s.sampling_steps))
            images = images.take(index)
            return recognised(s, s.reconstruct(images.x, seeds, t, steps, images.cond))

        return {f"from {share:g} T": partial(recalled, share) for share in (0.5, 0.7, 0.9)}


class Inversion(Durability):
    """The embedding of the forgotten class replaced by one optimised on at most 10 forgotten images, the network frozen.

    For a text model these are the embeddings of the tokens that occur only in prompts of the forgotten class. After Gal et
    al., arXiv:2208.01618, and Pham et al., arXiv:2308.01508.
    """

    name = "inversion"
    kinds = frozenset({"class", "concept"})
    cost = "`inversion_steps` optimiser steps of 32 rows on one embedding, then samples"

    def attacks(self, subject: Subject) -> dict[str, Attacked]:
        return {"embedding": lambda s: presence(inverted(s, s.sizes["inversion_steps"]))}


class Interpolation(Durability):
    """Weights moved part of the way back to the base."""

    model_kinds = EVERY
    name = "interpolation"
    needs = "forget set and base; `excess` needs oracles"
    cost = "samples, per strength"

    def attacks(self, subject: Subject) -> dict[str, Attacked]:
        if "base" not in subject.peers:
            raise Inapplicable("there is no base to move towards")
        base = subject.peers["base"].model.net.state_dict()

        def moved(share: float, s: Subject) -> np.ndarray:
            return presence(interpolated(s, base, share))

        return {f"{share:g}": partial(moved, share) for share in (0.25, 0.5)}


class SamplerRemoval(Durability):
    """Sampling with the base's sampler, for a candidate that forgets by its own."""

    name = "sampler_removal"
    cost = "samples"

    def attacks(self, subject: Subject) -> dict[str, Attacked]:
        if subject.model.sampler == subject.model.with_net(subject.model.net).sampler:
            raise Inapplicable("the model is sampled as its base is")
        return {"removed": lambda s: presence(s.with_model(s.model.with_net(s.model.net)))}


def presence(subject: Subject, stream: str = "durability", **sampling: Any) -> np.ndarray:
    """Presence of the forgotten data per unit (n,).

    0 or 1 per sample for a class, the correlation per draw of noise for an image, and for a contrastive model 0 or 1 per real
    image of the class.
    """
    if subject.task.model_kind == "contrastive":
        split = subject.task.splits[f"judge_{subject.sizes['judge']}"]
        forgotten = split.take((split.groups == subject.task.forget_class).nonzero()[:, 0])
        return (zero_shot(subject, forgotten).argmax(1) == subject.task.forget_class).astype(float)
    if subject.classed:
        cond = subject.forgotten(subject.sizes["class_samples"])
        return recognised(subject, subject.generate(cond, subject.seeds(stream, len(cond)), **sampling))
    images, seeds = subject.task.splits["forget"].distinct(), subject.seeds(stream, subject.sizes["noises"])
    columns = [correlation(*subject.rebuilt(images, i, seeds)) for i in range(len(images))]
    return torch.stack(columns, 1).mean(1).numpy()


def plain(subject: Subject) -> np.ndarray:
    """Presence without any attack, on the seeds that the attacks use."""
    return subject.once("durability.none", lambda: presence(subject))


def recognised(subject: Subject, images: torch.Tensor) -> np.ndarray:
    """1 for each image (n,) that the judge takes for the forgotten class, else 0."""
    return (subject.logits(images).argmax(1) == subject.task.forget_class).astype(float)


def _strengths(scores: Scores) -> tuple[list[str], list[str]]:
    """The strengths of an attack, and those that are its null."""
    names = [s for s in scores if s != NONE and not s.startswith("oracles.")]
    return [s for s in names if not s.startswith(NULL)], [s for s in names if s.startswith(NULL)]


def _units(scores: Scores, strength: str) -> tuple[np.ndarray, np.ndarray]:
    """Presence per unit (n,) after an attack of one strength, or its mean over all ("" for these), and the oracles' (n, k)."""
    names = [strength] if strength else _strengths(scores)[0]
    return np.mean([scores[s] for s in names], axis=0), np.mean([scores[f"oracles.{s}"] for s in names], axis=0)
