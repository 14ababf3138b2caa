"""Loss-based membership inference: are forgotten (and retained) images told from images never trained on?

Score of an image: minus its denoising loss at timesteps fixed beforehand (`membership_t`, the low ones, where training
leaves its mark), averaged over one noise bank shared by all images and models (Matsumoto et al., arXiv:2302.03262). The
timesteps are never picked by result. AUC by mid-ranks, interval by DeLong. Forgotten images are compared with their own
matched holdout, retained ones with theirs. An AUC below one half is not "safer": the attacker flips the sign; what counts
is the gap to the oracle.
"""

from __future__ import annotations

import numpy as np
import torch

from evaluators.base import Evaluator, Images, Metric, Scores, Subject
from evaluators.statistics import clopper_pearson, delong, normal_interval


class Membership(Evaluator):
    """AUC of the loss attack on forgotten and on retained images; arXiv:2302.03262."""

    name = "membership"
    directions = {"forget_auc": "target", "retain_auc": "target"}
    needs = "forget, retain and both holdout sets; `membership_noises` x 4 forward passes per image"

    def scores(self, subject: Subject) -> Scores:
        limit = subject.sizes["membership_images"]
        splits = subject.task.splits
        return {
            "forget": member_scores(subject, splits["forget"].distinct(), limit),
            "forget_holdout": member_scores(subject, splits["forget_holdout"], limit),
            "retain": member_scores(subject, splits["retain"], limit),
            "retain_holdout": member_scores(subject, splits["holdout"], limit),
        }

    def values(self, scores: Scores, subject: Subject) -> dict[str, float]:
        return {
            "forget_auc": delong(scores["forget"], scores["forget_holdout"])[0],
            "retain_auc": delong(scores["retain"], scores["retain_holdout"])[0],
        }

    def rows(self, scores: Scores, subject: Subject, replicates: dict[str, np.ndarray]) -> list[Metric]:
        rows = []
        for name, pos, neg in (
            ("forget_auc", scores["forget"], scores["forget_holdout"]),
            ("retain_auc", scores["retain"], scores["retain_holdout"]),
        ):
            auc, se = delong(pos, neg)
            if len(pos) == 1:  # the rank of one image among the holdout: a proportion, its interval exact
                lo, hi = clopper_pearson(int((neg < pos[0]).sum()), len(neg))
                reason = "one distinct forgotten image: uncertainty is over holdout images only"
                metric = Metric(name, auc, 1, None, lo, hi, "clopper-pearson over holdout images", reason=reason)
            else:
                lo, hi = normal_interval(auc, se)
                metric = Metric(name, auc, len(pos), se, max(0.0, lo), min(1.0, hi), "delong")
            rows.append(metric)
        return rows


def member_scores(subject: Subject, images: Images, limit: int) -> np.ndarray:
    """Minus the mean loss per image (n,), higher for members."""
    model = subject.model
    bank = model.noise(subject.seeds("membership", subject.sizes["membership_noises"]))
    x = images.x[:limit].to(bank)
    cond = None if images.cond is None else images.cond[:limit].to(x.device)
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    model.net.eval()
    with torch.no_grad():
        for t in subject.sizes["membership_t"]:
            times = torch.full((len(x),), t, device=x.device)
            for eps in bank:
                noise = eps.expand_as(x)
                output = model.predict(model.add_noise(x, noise, times), times, cond)
                total += (output - model.target(x, noise, times)).double().square().flatten(1).mean(1)
    return -(total / (len(bank) * len(subject.sizes["membership_t"]))).cpu().numpy()
