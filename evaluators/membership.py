"""Membership inference: are forgotten images told from images that were never trained on?

One evaluator per attack of `evaluators.attacks`, all reduced in the same way.

- Four populations: forgotten images against their own matched holdout, retained ones against theirs.
- Steps and sign are never picked by the result. The whole grid of steps is kept in the scores; the step that is reported
  and its sign are those at which the base model tells one half of the retained images best from one half of their holdout.
  What is reported about retained images comes from the other halves.
- An AUC below one half is not safe: the attacker flips the sign. `leak` = |AUC - 0.5|, and what counts is `gap`, the paired
  difference to the mean of the oracles on the same images and noises: its error holds the images (DeLong) and the oracles'
  own spread. `equivalence_p` is the p-value of "not within 0.05 of the oracles".
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
from evaluators.statistics import (
    advantage,
    auc_interval,
    clopper_pearson,
    delong,
    equivalence,
    normal_interval,
    paired_gap,
    tpr_at_fpr,
)

MARGIN = 0.05  # of the AUC, within which a model counts as equivalent to the oracles


class Attack(Evaluator):
    """How raw scores become metrics, for all attacks; `raw` is the attack."""

    directions: ClassVar[dict[str, Direction]] = {
        "auc": "target", "retain_auc": "target", "leak": "min", "gap": "target", "equivalence_p": "min",
        "advantage": "target", "tpr_at_1": "target", "tpr_at_01": "target",
    }  # fmt: skip
    needs = "forget and retain sets and the holdout of each; `gap` needs oracles"

    @abstractmethod
    def raw(self, subject: Subject) -> Scores:
        """Scores (n, steps) of each of `populations`."""

    def calibration(self, subject: Subject) -> tuple[int, int]:
        """(step, sign) at which the base tells the calibration halves apart best."""
        base = self.raw(subject.peers.get("base", subject))
        return calibrate(base["retain_calibration"], base["holdout_calibration"])

    def scores(self, subject: Subject) -> Scores:
        step, sign = self.calibration(subject)
        found = self.raw(subject) | {"calibration": np.array([[step, sign]], dtype=float)}
        oracles = [self.raw(o) for o in subject.oracles()]
        if oracles:
            for name in ("forget", "forget_holdout"):
                found[f"oracle_{name}"] = np.stack([o[name][:, step] for o in oracles], 1)
        return found

    def values(self, scores: Scores, subject: Subject) -> dict[str, float]:
        pos, neg = _reported(scores, "forget"), _reported(scores, "forget_holdout")
        auc = delong(pos, neg)[0]
        found = {"auc": auc, "leak": abs(auc - 0.5), "advantage": advantage(pos, neg)}
        if "retain" in scores:
            found["retain_auc"] = delong(_reported(scores, "retain"), _reported(scores, "holdout"))[0]
        if "oracle_forget" in scores:
            found["gap"] = paired_gap(pos, neg, *_oracles(scores))[0]
        return found

    def rows(self, scores: Scores, subject: Subject, replicates: dict[str, np.ndarray]) -> list[Metric]:
        pos, neg = _reported(scores, "forget"), _reported(scores, "forget_holdout")
        values = self.values(scores, subject)
        rows = [_auc("auc", pos, neg)]
        if "retain" in scores:
            rows.append(_auc("retain_auc", _reported(scores, "retain"), _reported(scores, "holdout")))
        low, high = rows[0].lo or 0.0, rows[0].hi or 0.0
        least = 0.0 if low <= 0.5 <= high else min(abs(low - 0.5), abs(high - 0.5))
        most = max(abs(low - 0.5), abs(high - 0.5))
        n = len(pos)
        rows.append(Metric("leak", values["leak"], n, rows[0].se, least, most, rows[0].interval, "min"))
        rows.append(Metric("advantage", values["advantage"], n, reason="largest over thresholds, so above 0 by chance"))
        for name, rate in (("tpr_at_1", 0.01), ("tpr_at_01", 0.001)):
            value, reason = tpr_at_fpr(pos, neg, rate)
            if value is None:
                rows.append(Metric(name, None, n, status="skipped", reason=reason))
            else:
                lo, hi = clopper_pearson(round(value * n), n)
                rows.append(Metric(name, value, n, None, lo, hi, "clopper-pearson"))
        if "oracle_forget" in scores:
            delta, se = paired_gap(pos, neg, *_oracles(scores))
            lo, hi = normal_interval(delta, se)
            method = "paired delong and spread of oracles"
            rows.append(Metric("gap", delta, n, se, lo, hi, method))
            p = equivalence(delta, se, MARGIN)
            reason = f"small: within {MARGIN} of the oracles' AUC (two one-sided tests)"
            rows.append(Metric("equivalence_p", p, n, direction="min", reason=reason))
        else:
            why = "there is no oracle to compare with, or none that is not a reference"
            rows += [Metric(name, None, n, status="skipped", reason=why) for name in ("gap", "equivalence_p")]
        return rows


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
        return attacks.loss(subject.model, images.x, images.cond, subject.sizes["membership_t"], bank(subject))


class SecMI(Scored):
    """t-error of SecMI; arXiv:2302.01316."""

    name = "secmi"
    cost = "largest step / 10 + steps passes per image"

    def score(self, subject: Subject, images: Images) -> np.ndarray:
        return attacks.secmi(subject.model, images.x, images.cond, subject.sizes["membership_t"])


class PIA(Scored):
    """Proximal initialisation; arXiv:2305.18355."""

    name = "pia"
    cost = "steps + 1 passes per image, no noise"
    normalised: ClassVar[bool] = False

    def score(self, subject: Subject, images: Images) -> np.ndarray:
        grid = subject.sizes["membership_t"]
        return attacks.pia(subject.model, images.x, images.cond, grid, normalised=self.normalised)


class PIAN(PIA):
    """Proximal initialisation, normalised; arXiv:2305.18355."""

    name = "pian"
    normalised = True


class SimA(Scored):
    """Magnitude of the predicted noise at the image itself; arXiv:2509.25003."""

    name = "sima"
    cost = "one pass per image and step, no noise"

    def score(self, subject: Subject, images: Images) -> np.ndarray:
        return attacks.sima(subject.model, images.x, images.cond, subject.sizes["membership_t"])


class CLiD(Scored):
    """Conditional likelihood discrepancy; arXiv:2405.14800. Its weight is picked on the calibration halves of the base.

    Conditions that say less are those that the base's model gives (`reduced`): the null label of a class; captions without
    their weightiest words, and none.
    """

    name = "clid"
    kinds = frozenset({"class", "concept"})
    needs = "conditions; forget and retain sets and the holdout of each; `gap` needs oracles"
    cost = "`membership_noises` passes per image, step and condition, own and reduced"

    def score(self, subject: Subject, images: Images) -> np.ndarray:
        own, discrepancy = self._parts(subject, images)
        weight, like = subject.peers.get("base", subject).once("clid.mix", lambda: self._mix(subject))
        columns = [
            attacks.robust_mix(own[:, t], discrepancy[:, t], weight[t], (like[0][:, t], like[1][:, t]))
            for t in range(own.shape[1])
        ]
        return np.stack(columns, 1)

    def _parts(self, subject: Subject, images: Images) -> tuple[np.ndarray, np.ndarray]:
        assert images.cond is not None
        model = subject.model
        reduced = subject.peers.get("base", subject).model.reduced(images.cond)  # one choice for all that are compared
        return attacks.clid(model, images.x, images.cond, reduced, subject.sizes["membership_t"], bank(subject))

    def _mix(self, subject: Subject) -> tuple[list[float], tuple[np.ndarray, np.ndarray]]:
        """Per step the weight in 0, 0.1, ..., 1 that tells the base's retained images best from their holdout."""
        base = subject.peers.get("base", subject)
        parts = (base.inputs(populations(base)[f"{name}_calibration"]) for name in ("retain", "holdout"))
        halves = [self._parts(base, images) for images in parts]
        weights = []
        for t in range(halves[0][0].shape[1]):
            like = (halves[1][0][:, t], halves[1][1][:, t])
            auc = [
                delong(*(attacks.robust_mix(own[:, t], other[:, t], w / 10, like) for own, other in halves))[0]
                for w in range(11)
            ]
            weights.append(int(np.argmax(np.abs(np.array(auc) - 0.5))) / 10)
        return weights, halves[1]


class Quantile(Attack):
    """Excess of the loss score over the 90 % quantile that small networks expect; arXiv:2312.05140.

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
    """An attack that takes the oracles as models known not to have seen the forgotten images.

    Step and sign are those of `loss`. It says nothing about retained images, which the oracles have seen.
    """

    least: ClassVar[int] = 1
    cost = "that of `loss`, on the oracles too"

    @abstractmethod
    def combine(self, own: Scores, oracles: list[Scores], name: str, step: int, sign: float) -> np.ndarray:
        """Scores (n,) of one population."""

    def raw(self, subject: Subject) -> Scores:
        return Loss().raw(subject)

    def scores(self, subject: Subject) -> Scores:
        oracles = subject.oracles()
        if len(oracles) < self.least:
            raise Inapplicable(f"needs {self.least} oracles besides the model itself; there are {len(oracles)}")
        step, sign = self.calibration(subject)
        own, others = self.raw(subject), [self.raw(o) for o in oracles]
        found = {"calibration": np.array([[0, 1.0]])}
        for name in ("forget", "forget_holdout"):
            found[name] = self.combine(own, others, name, step, sign)[:, None]
            if len(others) > self.least:  # each oracle against the rest
                columns = [
                    self.combine(o, others[:k] + others[k + 1 :], name, step, sign) for k, o in enumerate(others)
                ]
                found[f"oracle_{name}"] = np.stack(columns, 1)
        return found


class LiRA(_ByOracles):
    """Likelihood ratio, offline: against the oracles' scores of the same image; arXiv:2112.03570."""

    name = "lira"
    least = 2
    needs = "forget set and its holdout; two oracles"

    def combine(self, own: Scores, oracles: list[Scores], name: str, step: int, sign: float) -> np.ndarray:
        out = sign * np.stack([o[name][:, step] for o in oracles], 1)
        return attacks.lira_offline(sign * own[name][:, step], out)


class RMIA(_ByOracles):
    """Robust membership inference with the oracles as reference and the retained content's holdout as population;
    arXiv:2312.03262."""

    name = "rmia"
    needs = "forget set, its holdout and the population; an oracle"

    def combine(self, own: Scores, oracles: list[Scores], name: str, step: int, sign: float) -> np.ndarray:
        def reference(part: str) -> np.ndarray:
            return sign * np.mean([o[part][:, step] for o in oracles], axis=0)

        return attacks.rmia(
            sign * own[name][:, step], reference(name), sign * own["holdout"][:, step], reference("holdout")
        )


def populations(subject: Subject) -> dict[str, Images]:
    """The distinct images that attacks are made on, at most `membership_images` of each kind; of retained ones and their
    holdout one half is for calibration."""
    splits, limit = subject.task.splits, subject.sizes["membership_images"]
    found = {}
    for name in ("forget", "forget_holdout", "retain", "holdout"):
        images = splits[name].distinct()
        found[name] = images.take(torch.arange(min(limit, len(images))))
    for name in ("retain", "holdout"):
        half = torch.arange(len(found[name])) % 2 == 0
        found[f"{name}_calibration"], found[name] = found[name].take(half), found[name].take(~half)
    return found


def bank(subject: Subject) -> torch.Tensor:
    """The noises (k, C, H, W) that all images and models of a tier share."""
    return subject.model.noise(subject.seeds("membership", subject.sizes["membership_noises"]))


def calibrate(members: np.ndarray, others: np.ndarray) -> tuple[int, int]:
    """(column, sign) at which scores (n, columns) of known members differ most from those of known non-members.

    The sign is turned round only where members score lower beyond what the best of as many columns of noise would show: where a
    model has memorised nothing, a sign picked by noise would be wrong for half of all models.
    """
    found = np.array([delong(members[:, t], others[:, t]) for t in range(members.shape[1])])
    step = int(np.argmax(np.abs(found[:, 0] - 0.5)))
    auc, se = found[step]
    surely = norm.ppf(1 - 0.025 / len(found)) * se
    return step, -1 if auc < 0.5 - surely else 1


def _reported(scores: Scores, name: str) -> np.ndarray:
    step, sign = scores["calibration"][0]
    return sign * scores[name][:, int(step)]


def _oracles(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    sign = scores["calibration"][0][1]
    return sign * scores["oracle_forget"], sign * scores["oracle_forget_holdout"]


def _auc(name: str, pos: np.ndarray, neg: np.ndarray) -> Metric:
    auc, se, lo, hi = auc_interval(pos, neg)
    if len(pos) == 1:  # the rank of one image among the holdout: a proportion, its interval exact
        lo, hi = clopper_pearson(int((neg < pos[0]).sum()), len(neg))
        reason = "one distinct forgotten image: uncertainty is over holdout images only"
        return Metric(name, auc, 1, None, lo, hi, "clopper-pearson over holdout images", reason=reason)
    return Metric(name, auc, len(pos), se, lo, hi, "delong")
