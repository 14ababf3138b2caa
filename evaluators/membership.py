"""Membership inference: tells forgotten images from images that were never trained on.

One evaluator per attack of `evaluators.attacks`; all reduce scores to metrics in the same way.

- Four populations: forgotten images against their matched holdout, retained images against theirs.
- Step and sign are never chosen by the result. The whole grid of steps is kept in the scores; the reported step and its sign
  are those at which the base model best tells one half of the retained images from one half of their holdout. The metrics of
  retained images come from the other halves.
- An AUC below one half is not safe: the attacker flips the sign. Nor is one away from one half a leak: images that are
  easy, or hard, for every model give it to an oracle too. What counts is `gap`, on either side of 0: the paired difference to
  the mean of the oracles on the same images and noises; its error covers the images (DeLong) and the spread of the oracles.
  `equivalence_p` is the p-value of "not within 0.05 of the oracles".
- A single forgotten image has `rank` in place of an AUC, and a `gap` of ranks; see `evaluators.rank`.
- True positive rates at 1 % and 0.1 % need 1,000 and 10,000 non-members; with fewer there is no number.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np
import torch
from scipy.stats import norm

from evaluators import attacks
from evaluators.base import Direction, Evaluator, Images, Inapplicable, Metric, Scores, Subject
from evaluators.oracles import compare_auc
from evaluators.rank import ONE_IMAGE, rank_rows
from evaluators.statistics import (
    advantage,
    auc_interval,
    delong,
    paired_gap,
    tpr_at_fpr,
)

MARGIN = 0.05  # difference in AUC within which a model counts as equivalent to the oracles
NO_ORACLE = "there is no oracle to compare with, or none that is not a reference"


class Attack(Evaluator):
    """The reduction of raw scores to metrics, common to all attacks; subclasses define `raw`."""

    directions: ClassVar[dict[str, Direction]] = {
        "auc": "target",
        "rank": "target",
        "retain_auc": "target",
        "gap": "target",
        "equivalence_p": "min",
        "advantage": "target",
        "tpr_at_1": "target",
        "tpr_at_01": "target",
    }
    needs = "forget and retain sets and the holdout of each; `gap` needs oracles"

    @abstractmethod
    def raw(self, subject: Subject) -> Scores:
        """Scores (n, steps) of each of `populations`."""

    def calibration(self, subject: Subject) -> tuple[int, int]:
        """(step, sign) at which the base best tells the calibration halves apart."""
        base = self.raw(subject.peers.get("base", subject))
        return calibrate(base["retain_calibration"], base["holdout_calibration"])

    def scores(self, subject: Subject) -> Scores:
        step, sign = self.calibration(subject)
        scores = self.raw(subject) | {"calibration": np.array([[step, sign]], dtype=float)}
        oracles = [self.raw(o) for o in subject.oracles()]
        if oracles:
            for name in ("forget", "forget_holdout"):
                scores[f"oracle_{name}"] = np.stack([o[name][:, step] for o in oracles], 1)
        return scores

    def values(self, scores: Scores, subject: Subject) -> dict[str, float]:
        values = {}
        if "retain" in scores:
            values["retain_auc"] = delong(_reported(scores, "retain"), _reported(scores, "holdout"))[0]
        if is_single(subject):  # its rank is not a mean over units, which the jackknife could leave out
            return values
        pos, neg = _reported(scores, "forget"), _reported(scores, "forget_holdout")
        values |= {"auc": delong(pos, neg)[0], "advantage": advantage(pos, neg)}
        if "oracle_forget" in scores:
            values["gap"] = paired_gap(pos, neg, *_oracle_scores(scores))[0]
        return values

    def rows(self, scores: Scores, subject: Subject, replicates: dict[str, np.ndarray]) -> list[Metric]:
        pos, neg = _reported(scores, "forget"), _reported(scores, "forget_holdout")
        n, oracles = len(pos), _oracle_scores(scores) if "oracle_forget" in scores else None
        retained = []
        if "retain" in scores:
            retained.append(_auc("retain_auc", _reported(scores, "retain"), _reported(scores, "holdout")))
        if is_single(subject):
            lacking = ("auc", "advantage", "tpr_at_1", "tpr_at_01", "equivalence_p")
            absent = (Metric.absent(name, ONE_IMAGE, n=n, direction=self.directions[name]) for name in lacking)
            return [*rank_rows(pos, neg, oracles, NO_ORACLE), *retained, *absent]
        rows = [_auc("auc", pos, neg), *retained]
        reason = "largest over thresholds, so above 0 by chance, for oracles too"
        rows.append(Metric("advantage", advantage(pos, neg), n, reason=reason))
        for name, rate in (("tpr_at_1", 0.01), ("tpr_at_01", 0.001)):
            value, reason = tpr_at_fpr(pos, neg, rate)
            rows.append(Metric.absent(name, reason, n=n) if value is None else Metric.share(name, value, n))
        if oracles is not None:
            return rows + _against_oracles(pos, neg, *oracles)
        return rows + [Metric.absent(name, NO_ORACLE, n=n) for name in ("gap", "equivalence_p")]


class Scored(Attack):
    """An attack that scores each image by itself."""

    @abstractmethod
    def score(self, subject: Subject, images: Images) -> np.ndarray:
        """Scores (n, steps) of images, as the network takes them, under the subject's model."""

    def raw(self, subject: Subject) -> Scores:
        def make() -> Scores:
            return {name: self.score(subject, subject.inputs(images)) for name, images in populations(subject).items()}

        return subject.once(f"{self.name}.raw", make)


class Loss(Scored):
    """Minus the denoising loss on a shared bank of noises; arXiv:2302.03262."""

    name = "loss"
    cost = "`membership_noises` passes per image and step"

    def score(self, subject: Subject, images: Images) -> np.ndarray:
        return attacks.loss(
            subject.model, images.x, images.cond, subject.sizes["membership_t"], bank(subject), subject.batches
        )


class SecMI(Scored):
    """t-error of SecMI; arXiv:2302.01316."""

    name = "secmi"
    cost = "largest step / `membership_stride` + steps passes per image"

    def score(self, subject: Subject, images: Images) -> np.ndarray:
        times, stride = subject.sizes["membership_t"], subject.sizes["membership_stride"]
        return attacks.secmi(subject.model, images.x, images.cond, times, subject.batches, stride=stride)


class PIA(Scored):
    """Proximal initialisation; arXiv:2305.18355."""

    name = "pia"
    cost = "steps + 1 passes per image, no noise"
    normalised: ClassVar[bool] = False

    def score(self, subject: Subject, images: Images) -> np.ndarray:
        times = subject.sizes["membership_t"]
        return attacks.pia(subject.model, images.x, images.cond, times, subject.batches, normalised=self.normalised)


class PIAN(PIA):
    """Proximal initialisation, normalised; arXiv:2305.18355."""

    name = "pian"
    normalised = True


class SimA(Scored):
    """Magnitude of the predicted noise at the image itself; arXiv:2509.25003."""

    name = "sima"
    cost = "one pass per image and step, no noise"

    def score(self, subject: Subject, images: Images) -> np.ndarray:
        return attacks.sima(subject.model, images.x, images.cond, subject.sizes["membership_t"], subject.batches)


class CLiD(Scored):
    """Conditional likelihood discrepancy; arXiv:2405.14800. Its weight is chosen on the calibration halves of the base.

    The base's model gives the reduced conditions (`reduced`): the null label for a class; for captions those without their
    most important words, and the empty one.
    """

    name = "clid"
    kinds = frozenset({"class", "concept"})
    needs = "conditions; forget and retain sets and the holdout of each; `gap` needs oracles"
    cost = "`membership_noises` passes per image, step and condition, own and reduced"

    def score(self, subject: Subject, images: Images) -> np.ndarray:
        score, discrepancy = self._parts(subject, images)
        base = subject.peers.get("base", subject)
        weights, population = base.once("clid.mix", lambda: self._calibrated_weights(base))
        columns = [
            attacks.robust_mix(score[:, t], discrepancy[:, t], weights[t], (population[0][:, t], population[1][:, t]))
            for t in range(score.shape[1])
        ]
        return np.stack(columns, 1)

    def _parts(self, subject: Subject, images: Images) -> tuple[np.ndarray, np.ndarray]:
        """(loss score, discrepancy), each (n, steps)."""
        assert images.cond is not None
        reduced = subject.peers.get("base", subject).model.reduced(images.cond)  # the base's, for all models alike
        times = subject.sizes["membership_t"]
        return attacks.clid(subject.model, images.x, images.cond, reduced, times, bank(subject), subject.batches)

    def _calibrated_weights(self, base: Subject) -> tuple[list[float], tuple[np.ndarray, np.ndarray]]:
        """(weight per step, parts of the calibration holdout, which set the scales).

        The weight in 0, 0.1, ..., 1 is the one that best tells the base's retained images from their holdout.
        """
        images = populations(base)
        retain, holdout = (
            self._parts(base, base.inputs(images[f"{name}_calibration"])) for name in ("retain", "holdout")
        )
        weights = []
        for t in range(retain[0].shape[1]):
            scale = (holdout[0][:, t], holdout[1][:, t])
            auc = [
                delong(*(attacks.robust_mix(s[:, t], d[:, t], w / 10, scale) for s, d in (retain, holdout)))[0]
                for w in range(11)
            ]
            weights.append(int(np.argmax(np.abs(np.array(auc) - 0.5))) / 10)
        return weights, holdout


class Quantile(Attack):
    """Excess of the loss score over the 90 % quantile that small networks predict; arXiv:2312.05140.

    Step and sign are those of `loss`. The networks learn from the calibration half of the retained content's holdout.
    """

    name = "quantile"
    cost = "that of `loss`, and five small networks"

    def raw(self, subject: Subject) -> Scores:
        def make() -> Scores:
            step, sign = Loss().calibration(subject)
            loss = {name: sign * scores[:, step] for name, scores in Loss().raw(subject).items()}
            images, population = populations(subject), "holdout_calibration"
            seed = int(subject.seeds("quantile", 1)[0]) % 2**31
            expected = attacks.expected_quantile(images[population].x, loss[population], seed=seed)
            return {name: (scores - expected(images[name].x))[:, None] for name, scores in loss.items()}

        return subject.once("quantile.raw", make)


class _ByOracles(Attack):
    """An attack with the oracles as models known not to have seen the forgotten images.

    Step and sign are those of `loss`. It has no metrics of retained images, which the oracles have seen.
    least: oracles that it needs besides the model itself.
    """

    least: ClassVar[int] = 1
    cost = "that of `loss`, also on the oracles"

    @abstractmethod
    def combine(self, model: Scores, oracles: list[Scores], name: str, step: int, sign: float) -> np.ndarray:
        """Scores (n,) of one population."""

    def raw(self, subject: Subject) -> Scores:
        return Loss().raw(subject)

    def scores(self, subject: Subject) -> Scores:
        oracles = subject.oracles()
        if len(oracles) < self.least:
            raise Inapplicable(f"needs {self.least} oracles besides the model itself; there are {len(oracles)}")
        step, sign = self.calibration(subject)
        model, others = self.raw(subject), [self.raw(o) for o in oracles]
        scores = {"calibration": np.array([[0, 1.0]])}
        for name in ("forget", "forget_holdout"):
            scores[name] = self.combine(model, others, name, step, sign)[:, None]
            if len(others) > self.least:  # each oracle against the rest
                columns = [
                    self.combine(o, others[:k] + others[k + 1 :], name, step, sign) for k, o in enumerate(others)
                ]
                scores[f"oracle_{name}"] = np.stack(columns, 1)
        return scores


class LiRA(_ByOracles):
    """Offline likelihood ratio, against the oracles' scores of the same image; arXiv:2112.03570."""

    name = "lira"
    least = 2
    needs = "forget set and its holdout; two oracles"

    def combine(self, model: Scores, oracles: list[Scores], name: str, step: int, sign: float) -> np.ndarray:
        out = {part: sign * np.stack([o[part][:, step] for o in oracles], 1) for part in ("forget", "forget_holdout")}
        # one scale for both populations: of a single image the oracles' deviation would be a number of chance
        return attacks.lira_offline(sign * model[name][:, step], out[name], np.concatenate(list(out.values())))


class RMIA(_ByOracles):
    """Robust membership inference, arXiv:2312.03262.

    The oracles are the reference and the holdout of the retained content is the population.
    """

    name = "rmia"
    needs = "forget set, its holdout and the population; an oracle"

    def combine(self, model: Scores, oracles: list[Scores], name: str, step: int, sign: float) -> np.ndarray:
        def reference(part: str) -> np.ndarray:
            return sign * np.mean([o[part][:, step] for o in oracles], axis=0)

        return attacks.rmia(
            sign * model[name][:, step], reference(name), sign * model["holdout"][:, step], reference("holdout")
        )


def is_single(subject: Subject) -> bool:
    """Whether one distinct image is to be forgotten."""
    return subject.once("single", lambda: len(subject.task.splits["forget"].distinct()) == 1)


def populations(subject: Subject) -> dict[str, Images]:
    """The distinct images that attacks are made on, at most `membership_images` of each kind.

    One half of the retained ones and one half of their holdout are for calibration.
    """
    splits, limit = subject.task.splits, subject.sizes["membership_images"]
    images = {}
    for name in ("forget", "forget_holdout", "retain", "holdout"):
        distinct = splits[name].distinct()
        images[name] = distinct.take(torch.arange(min(limit, len(distinct))))
    for name in ("retain", "holdout"):
        half = torch.arange(len(images[name])) % 2 == 0
        images[f"{name}_calibration"], images[name] = images[name].take(half), images[name].take(~half)
    return images


def bank(subject: Subject) -> torch.Tensor:
    """The noises (k, C, H, W) shared by all images and models of a tier."""
    return subject.model.noise(subject.seeds("membership", subject.sizes["membership_noises"]))


def calibrate(members: np.ndarray, others: np.ndarray) -> tuple[int, int]:
    """(column, sign) at which scores (n, columns) of known members differ most from those of known non-members.

    The sign is -1 only if members score lower by more than the largest difference that noise would give over that many
    columns: where a model has memorised nothing, a sign chosen by noise would be wrong for half of all models.
    """
    results = np.array([delong(members[:, t], others[:, t]) for t in range(members.shape[1])])
    step = int(np.argmax(np.abs(results[:, 0] - 0.5)))
    auc, se = results[step]
    margin = norm.ppf(1 - 0.025 / len(results)) * se
    return step, -1 if auc < 0.5 - margin else 1


def _reported(scores: Scores, name: str) -> np.ndarray:
    """Scores (n,) of a population at the calibrated step, with the calibrated sign."""
    step, sign = scores["calibration"][0]
    return sign * scores[name][:, int(step)]


def _oracle_scores(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """The oracles' scores of forgotten images and of their holdout, (n, oracles) and (m, oracles)."""
    sign = scores["calibration"][0][1]
    return sign * scores["oracle_forget"], sign * scores["oracle_forget_holdout"]


def _auc(name: str, pos: np.ndarray, neg: np.ndarray) -> Metric:
    if min(len(pos), len(neg)) < 2:
        return Metric.absent(name, ONE_IMAGE, n=len(pos))
    auc, se, lo, hi = auc_interval(pos, neg)
    if lo == hi:
        return Metric(name, auc, len(pos), reason="no interval: all images have the same score")
    return Metric(name, auc, len(pos), se=se, lo=lo, hi=hi, interval="delong")


def _against_oracles(pos: np.ndarray, neg: np.ndarray, pos_ref: np.ndarray, neg_ref: np.ndarray) -> list[Metric]:
    """`gap` and `equivalence_p`; see `compare_auc` for shapes."""
    comparison = compare_auc(pos, neg, pos_ref, neg_ref)
    reason = f"small: within {MARGIN} of the oracles' mean AUC (two one-sided tests)"
    return [
        Metric.against_oracles("gap", comparison, len(pos), over="images"),
        Metric("equivalence_p", comparison.p_beyond(MARGIN), len(pos), direction="min", reason=reason),
    ]
