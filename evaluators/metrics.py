"""Measurements with their uncertainty."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import numpy as np

from evaluators.oracles import Comparison
from evaluators.statistics import clopper_pearson, jackknife_interval, t_interval

Direction = Literal["min", "max", "target"]
Status = Literal["ok", "failed", "skipped"]
SHARE = "clopper-pearson"  # first word of the interval method of shares of samples


@dataclass(frozen=True)
class Metric:
    """One measurement with its uncertainty.

    value: None if it could not be computed; `reason` then says why.
    n: independent units behind the value.
    se: standard error; lo, hi: ends of the 95 % interval; None without one. interval: the method of both.
    comparison: of a difference to the oracles, all of its errors; None for others.
    direction: which way is better; "target" means "like the oracle".
    reason: why a value is missing, or what limits it.
    check: the evaluator that measured it; the audit fills it in.
    """

    name: str
    value: float | None
    n: int
    _: KW_ONLY
    se: float | None = None
    lo: float | None = None
    hi: float | None = None
    interval: str = "none"
    comparison: Comparison | None = None
    direction: Direction = "target"
    status: Status = "ok"
    reason: str = ""
    check: str = ""

    @classmethod
    def share(
        cls, name: str, value: float, n: int, *, over: str = "", direction: Direction = "target", reason: str = ""
    ) -> Metric:
        """A share of n independent units, with the exact interval of Clopper and Pearson for round(value n) hits."""
        lo, hi = clopper_pearson(round(value * n), n)
        method = f"{SHARE} over {over}" if over else SHARE
        return cls(name, value, n, lo=lo, hi=hi, interval=method, direction=direction, reason=reason)

    @classmethod
    def mean(
        cls,
        name: str,
        value: float,
        units: np.ndarray,
        *,
        over: str,
        offset: float = 0.0,
        direction: Direction = "target",
        reason: str = "",
    ) -> Metric:
        """A mean of independent units (n,), plus a constant `offset`, with the interval of Student's t.

        Without an interval, and with the reason, for a single unit or units that do not differ.
        """
        if len(units) < 2 or _is_constant(units):
            lack = f"no interval: all {over} give the same" if len(units) > 1 else f"no interval: one unit ({over})"
            return cls(name, value, len(units), direction=direction, reason=_joined(reason, lack))
        se, lo, hi = t_interval(units)
        return cls(
            name,
            value,
            len(units),
            se=se,
            lo=lo + offset,
            hi=hi + offset,
            interval=f"student-t over {over}",
            direction=direction,
            reason=reason,
        )

    @classmethod
    def jackknife(
        cls,
        name: str,
        value: float,
        n: int,
        replicates: np.ndarray,
        *,
        over: str,
        bounds: tuple[float, float] = (-math.inf, math.inf),
        direction: Direction = "target",
        reason: str = "",
    ) -> Metric:
        """A function of n units, with the interval of the delete-a-group jackknife.

        replicates: the value without each group of units in turn (groups,). bounds: the range of the metric, at which the interval
        ends. Without an interval, and with the reason, if no group makes a difference: an error of 0 would be wrong.
        """
        if _is_constant(replicates):
            lack = f"no interval: leaving groups of {over} out does not change it"
            return cls(name, value, n, direction=direction, reason=_joined(reason, lack))
        se, lo, hi = jackknife_interval(value, replicates)
        return cls(
            name,
            value,
            n,
            se=se,
            lo=max(bounds[0], lo),
            hi=min(bounds[1], hi),
            interval=f"jackknife over {over}",
            direction=direction,
            reason=reason,
        )

    @classmethod
    def against_oracles(cls, name: str, comparison: Comparison, n: int, *, over: str, reason: str = "") -> Metric:
        """A difference to the mean of the oracles, with the interval of the difference to one further oracle."""
        alone, known = comparison.spread is None, comparison.se > 0
        method = f"student-t over {over}" if alone else f"prediction of a further oracle, sampling of {over}"
        unknown = "one oracle: how much oracles differ is unknown and not in the interval" if alone else ""
        still = "" if known else "no interval: nothing that was measured varies"
        lo, hi = comparison.interval() if known else (None, None)
        return cls(
            name,
            comparison.difference,
            n,
            se=comparison.se if known else None,
            lo=lo,
            hi=hi,
            interval=method if known else "none",
            comparison=comparison,
            reason="; ".join(filter(None, (reason, unknown, still))),
        )

    @classmethod
    def absent(
        cls,
        name: str,
        reason: str,
        *,
        n: int = 0,
        status: Status = "skipped",
        direction: Direction = "target",
        check: str = "",
    ) -> Metric:
        """A metric without a value, and the reason."""
        return cls(name, None, n, direction=direction, status=status, reason=reason, check=check)


def _is_constant(values: np.ndarray) -> bool:
    """Whether numbers (n,) are equal but for rounding."""
    return bool(np.ptp(values) <= 1e-12 * max(1.0, float(np.abs(values).max())))


def _joined(*reasons: str) -> str:
    return "; ".join(filter(None, reasons))
