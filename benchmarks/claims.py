"""Tests the papers' claims on digits: each claim is one experiment with a verdict.

    python benchmarks/claims.py                    # all of them
    python benchmarks/claims.py siss_on_the_front  # one

    rg_beats_graddiff      picture: at equal residue the restricted gradient costs less damage than GradDiff
    balanced_beats_near    class: retain rows of nine classes preserve better than as many of the two nearest ones
    siss_on_the_front      picture: SISS forgets what naive deletion keeps and keeps what NegGrad destroys
    siss_middle_lam        picture: lam = 0.5 beats both ends
    sfd_keeps_quality      class: at UA >= 0.95 the one-step generator is as good as one distilled without forgetting
    two_stage_is_sooner    class: forgetting from a distilled generator takes fewer steps
    slug_pareto_layers     class, U-Net: Pareto layers are better to edit than others
    slug_pareto_on_clip    the same on a small CLIP trained on captioned digits, the paper's own setting
    salun_mask_helps       class: a mask of half of the weights preserves better than none

Differences are paired by seed (`--seeds`, three by default) unless it says otherwise. A claim is confirmed if the 95 % Student-t interval
of its difference lies on its side of zero (or above a margin, for equal quality), contradicted if it lies on the other, and
undecided otherwise. Results go to `benchmarks/results/claims.json`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ground import Ground, machine, save_lines
from scipy.stats import mannwhitneyu

from evaluators.statistics import t_interval
from methods.slug import SLUG, SLUGSettings, candidates
from raysweep.auditing.measure import measure, subject_of
from raysweep.config.schema import Tier
from raysweep.storage.seeds import derive_seed

SEEDS = range(3)
RESULTS = Path(__file__).parent / "results" / "claims.json"
_grounds: dict[str, Ground] = {}


def ground(kind: str) -> Ground:
    """This process's ground."""
    if kind not in _grounds:
        _grounds[kind] = Ground(f"task=digits-{'class' if kind == 'class' else 'picture'}", "oracles=3")
    return _grounds[kind]


def audited(kind: str, method: str, settings: dict[str, Any], seed: int) -> dict[str, float]:
    """The full audit's numbers for one candidate."""
    g = ground(kind)
    candidate = g.make(method, settings, derive_seed("claim", seed))
    assert not isinstance(candidate, str), candidate
    measured = g.measure(candidate.model, "audit")
    result, v = g.objectives(measured, "audit"), measured.values
    figures = {"residue": result.residue, "damage": result.damage, "frechet": v["fidelity.frechet"]}
    if kind == "class":
        figures |= {"ua": 1 - v["classifier.recognised"], "ra": v["classifier.retain_accuracy"]}
    return figures


def verdict(differences: list[float], margin: float = 0.0) -> dict[str, Any]:
    """Positive differences speak for the claim; it holds if they lie above -margin."""
    _, low, high = t_interval(np.array(differences))
    outcome = "confirmed" if low > -margin else "contradicted" if high < -margin else "undecided"
    return {"difference": float(np.mean(differences)), "lo": low, "hi": high, "n": len(differences), "verdict": outcome}


def rg_beats_graddiff() -> dict[str, Any]:
    """Both methods over a grid of lam; damage interpolated at equal residue."""
    lams, settings = (8.0, 4.0, 2.0, 1.0, 0.5), {"lr": 1.5e-4, "steps": 24, "batch_size": 64, "trunc_elem_sq": None}
    curves = {
        m: [[audited("points", m, settings | {"lam": lam}, s) for lam in lams] for s in SEEDS]
        for m in ("graddiff", "rg")
    }

    def at(curve: list[dict[str, float]], residue: float) -> float:
        points = sorted((c["residue"], c["damage"]) for c in curve)
        return float(np.interp(residue, [p[0] for p in points], [p[1] for p in points]))

    differences = [at(a, 0.3) - at(b, 0.3) for a, b in zip(curves["graddiff"], curves["rg"], strict=True)]
    return verdict(differences) | {"what": "damage of graddiff minus rg at residue 0.3", "curves": curves}


def balanced_beats_near() -> dict[str, Any]:
    """The ablation of the retain set: two near classes against nine, 162 rows in both."""
    common = {"lr": 1e-3, "steps": 20, "batch_size": 64, "lam": 1.0, "trunc_elem_sq": 1.0, "retain_pass": "balanced"}
    near = [audited("class", "rgd", common | {"retain_groups": (5, 8), "retain_per_group": 81}, s) for s in SEEDS]
    nine = [audited("class", "rgd", common | {"retain_per_group": 18}, s) for s in SEEDS]
    differences = [a["damage"] - b["damage"] for a, b in zip(near, nine, strict=True)]
    accuracy = [b["ra"] - a["ra"] for a, b in zip(near, nine, strict=True)]
    quality = [float(np.log(a["frechet"] / b["frechet"])) for a, b in zip(near, nine, strict=True)]
    return verdict(quality) | {
        "what": "log Frechet distance of two near classes x 81 minus nine x 18",
        "retain_accuracy": verdict(accuracy),
        "damage": verdict(differences),
        "near": near,
        "nine": nine,
    }


def _siss(lam: float, seed: int) -> dict[str, float]:
    return audited("points", "siss", {"lr": 4e-4, "steps": 24, "batch_size": 64, "rho": 0.8, "lam": lam}, seed)


def siss_on_the_front() -> dict[str, Any]:
    """SISS between its two extremes."""
    naive = [audited("points", "finetune", {"lr": 4e-4, "steps": 24, "batch_size": 64}, s) for s in SEEDS]
    ascent = [audited("points", "neggrad", {"lr": 3e-4, "steps": 10, "batch_size": 64}, s) for s in SEEDS]
    middle = [_siss(0.5, s) for s in SEEDS]
    forgets = verdict([a["residue"] - b["residue"] for a, b in zip(naive, middle, strict=True)])
    keeps = verdict([a["damage"] - b["damage"] for a, b in zip(ascent, middle, strict=True)])
    both = "confirmed" if {forgets["verdict"], keeps["verdict"]} == {"confirmed"} else "undecided"
    return {
        "verdict": both,
        "what": "residue below naive deletion's and damage below NegGrad's",
        "residue": forgets,
        "damage": keeps,
        "naive": naive,
        "neggrad": ascent,
        "siss": middle,
    }


def siss_middle_lam() -> dict[str, Any]:
    """The defensive mixture against its ends."""
    models = {str(lam): [_siss(lam, s) for s in SEEDS] for lam in (0.0, 0.5, 1.0)}
    worst = {lam: [max(f["residue"], f["damage"]) for f in each] for lam, each in models.items()}
    ends = {e: verdict([a - b for a, b in zip(worst[e], worst["0.5"], strict=True)]) for e in ("0.0", "1.0")}
    kinds = {v["verdict"] for v in ends.values()}
    outcome = "confirmed" if kinds == {"confirmed"} else "contradicted" if "contradicted" in kinds else "undecided"
    return {
        "verdict": outcome,
        "what": "max(residue, damage) of an end minus the middle's",
        "ends": ends,
        "models": models,
    }


SFD = {
    "steps": 80,
    "batch_size": 32,
    "forget_batch_size": 8,
    "lr": 5e-4,
    "lr_fake": 1e-3,
    "t_min": 38,
    "t_max": 980,
    "ema": 0.97,
}


def sfd_keeps_quality() -> dict[str, Any]:
    """One-step generators distilled with and without forgetting, equal steps."""
    plain = [audited("class", "sfd", SFD | {"forget": 0.0, "fake_forget": 0.0}, s) for s in SEEDS]
    forgot = [audited("class", "sfd", SFD | {"forget": 1.0, "fake_forget": 1.0}, s) for s in SEEDS]
    start = audited("class", "sfd", SFD | {"steps": 0}, 0)
    quality = verdict([float(np.log(a["frechet"] / b["frechet"])) for a, b in zip(plain, forgot, strict=True)], 0.25)
    if min(f["ua"] for f in forgot) < 0.95:
        quality["verdict"] = "undecided"
    return quality | {
        "what": "log Frechet distance without minus with forgetting, margin 0.25",
        "start": start,
        "plain": plain,
        "forgot": forgot,
    }


def two_stage_is_sooner() -> dict[str, Any]:
    """Unlearning accuracy after few steps, from the base model and from a distilled generator."""
    common = SFD | {"forget": 0.3, "fake_forget": 1.0, "ema": 0.0}
    stage1 = {
        "stage1_steps": 80,
        "stage1_batch_size": 32,
        "stage1_lr": 5e-4,
        "stage1_lr_fake": 1e-3,
        "stage1_ema": 0.97,
    }
    counts = (1, 2, 4, 8)
    one = [[audited("class", "sfd", common | {"steps": k}, s) for k in counts] for s in SEEDS]
    two = [[audited("class", "sfd_two_stage", common | stage1 | {"steps": k}, s) for k in counts] for s in SEEDS]
    mean = lambda run: float(np.mean([m["ua"] for m in run]))  # noqa: E731
    differences = [mean(b) - mean(a) for a, b in zip(one, two, strict=True)]
    return verdict(differences) | {
        "what": f"UA averaged over {counts} steps, two stages minus one",
        "one": one,
        "two": two,
    }


def _layers(prepared: dict[str, torch.Tensor], hp: SLUGSettings, score: Callable[[str], float]) -> dict[str, Any]:
    """Best score of each Pareto layer and of each other eligible tensor; Mann-Whitney over layers."""
    front = set(candidates(prepared, hp))
    scores = {n: score(n) for n in candidates(prepared, hp.model_copy(update={"candidates": "all"}))}
    inside, outside = [s for n, s in scores.items() if n in front], [s for n, s in scores.items() if n not in front]
    p, other = (float(mannwhitneyu(inside, outside, alternative=a).pvalue) for a in ("greater", "less"))
    outcome = "confirmed" if p < 0.05 else "contradicted" if other < 0.05 else "undecided"
    return {
        "verdict": outcome,
        "p": p,
        "pareto": {n: scores[n] for n in sorted(front)},
        "pareto_mean": float(np.mean(inside)),
        "others_mean": float(np.mean(outside)),
        "others_best": max(outside),
        "n": len(inside),
        "others": len(outside),
    }


def slug_pareto_layers() -> dict[str, Any]:
    """Edits every eligible tensor of the U-Net alone, at three steps."""
    g, hp = ground("class"), SLUGSettings(batch_size=64)
    prepared = g.prepared(SLUG, hp)
    tier = Tier(seed=3, judge="probe", checks=("classifier",), samples=90, class_samples=50, groups=5)

    def score(layer: str) -> float:
        best = 0.0
        for step in (0.3, 1.0, 3.0):
            candidate = g.make("slug", {"layer": layer, "step": step, "batch_size": 64}, 0)
            v = measure(subject_of(candidate.model, g.task, g.judges["probe"], tier), tier).values  # type: ignore[union-attr]
            best = max(best, min(1 - v["classifier.recognised"], v["classifier.retain_accuracy"]))
        return best

    return _layers(prepared, hp, score) | {"what": "best min(UA, RA) over steps 0.3, 1, 3 by layer; one gradient"}


def slug_pareto_on_clip() -> dict[str, Any]:
    """Edits every eligible tensor of a CLIP alone, at six steps, for each of ten digits."""
    from clip_digits import WORDS, Digits

    digits, hp, by_digit = Digits(), SLUGSettings(batch_size=128), {}
    base = [digits.accuracy(digits.model) for digits.forget in range(len(WORDS))]
    for digits.forget in range(len(WORDS)):
        prepared = SLUG.prepare(digits.model, digits, 0, hp)

        def score(layer: str, prepared: dict[str, torch.Tensor] = prepared) -> float:
            best = 0.0
            for step in (0.03, 0.1, 0.2, 0.4, 0.8, 1.6):
                method = SLUG(
                    digits.copy(), SLUGSettings(layer=layer, step=step, batch_size=128), prepared, digits.goal
                )
                method.step({})
                forget, others = digits.accuracy(method.model)
                best = max(best, min(1 - forget, others))
            return best

        by_digit[WORDS[digits.forget]] = _layers(prepared, hp, score)
    means = [f["pareto_mean"] - f["others_mean"] for f in by_digit.values()]
    best = [max(f["pareto"].values()) for f in by_digit.values()]
    return verdict(means) | {
        "what": "best min(1 - forget accuracy, accuracy of the others): mean of Pareto layers minus mean of the others, by digit",
        "best_pareto_layer": {"mean": float(np.mean(best)), "min": min(best)},
        "base_accuracy": float(np.mean([f for f, _ in base])),
        "digits": by_digit,
    }


def salun_mask_helps() -> dict[str, Any]:
    """Random labels with half of the weights masked, and with none."""
    common = {"lr": 1e-3, "steps": 20, "batch_size": 32, "alpha": 1.0, "relabel": "random"}
    models = {str(f): [audited("class", "salun", common | {"fraction": f}, s) for s in SEEDS] for f in (0.5, 1.0)}
    quality = [float(np.log(a["frechet"] / b["frechet"])) for a, b in zip(models["1.0"], models["0.5"], strict=True)]
    forgets = [b["ua"] - a["ua"] for a, b in zip(models["1.0"], models["0.5"], strict=True)]
    return verdict(quality) | {
        "what": "log Frechet distance without minus with the mask",
        "ua": verdict(forgets),
        "models": models,
    }


CLAIMS = (
    rg_beats_graddiff,
    balanced_beats_near,
    siss_on_the_front,
    siss_middle_lam,
    sfd_keeps_quality,
    two_stage_is_sooner,
    slug_pareto_layers,
    slug_pareto_on_clip,
    salun_mask_helps,
)


def main() -> None:
    """Runs the named claims and prints a line for each."""
    global SEEDS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    args = parser.parse_args()
    SEEDS = range(args.seeds)
    wanted = args.names or [c.__name__ for c in CLAIMS]
    RESULTS.parent.mkdir(exist_ok=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for claim in CLAIMS:
        if claim.__name__ in wanted:
            results[claim.__name__] = claim() | {"about": machine()}
            short = {k: v for k, v in results[claim.__name__].items() if isinstance(v, str | int | float)}
            print(f"{claim.__name__}: {json.dumps(short)}", flush=True)
            save_lines(RESULTS, [json.dumps(results, indent=1)])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
