"""The tables of a report as records of text: all arithmetic and formatting is done here, none in the template."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from raysweep.auditing.informative import caveat
from raysweep.report.data import ReportData
from raysweep.results.front_row import FrontRow
from raysweep.tasks.records import listed

NO_METHOD = "#888888"  # colour of anchors
OVER_FORGOTTEN = 0.1  # over-forgetting from which an audit sheet mentions it
REASONS = 20  # for which trials failed, a line each
YES_NO = {True: "yes", False: "no", None: "-"}


@dataclass(frozen=True)
class FrontLine:
    """An audited candidate or an anchor. on_front: whether it is on the overall front or at least on its method's."""

    trial: str
    method: str
    colour: str
    residue: str
    damage: str
    probe: str
    over_forgetting: str
    on_front: str
    p_dominated: str
    audits: str


def front_lines(data: ReportData) -> list[FrontLine]:
    """The candidates that are shown in detail, the front first, and the anchors."""

    def rank(p: FrontRow) -> tuple[bool, bool, bool, float]:
        return not p.is_candidate, not p.on_front, not p.on_method_front, p.worst if p.is_candidate else 0.0

    return [
        FrontLine(
            trial=p.trial,
            method=p.method or "anchor",
            colour=data.styles.get(p.method, (NO_METHOD, ""))[0],
            residue=p.in_brief("residue"),
            damage=p.in_brief("damage"),
            probe="-" if p.probe_residue is None else f"{p.probe_residue:.3f} / {p.probe_damage:.3f}",
            over_forgetting=f"{p.over_forgetting:.3f}",
            on_front="its method's" if p.on_method_front and not p.on_front else YES_NO[p.on_front],
            p_dominated="-" if p.p_dominated is None else f"{p.p_dominated:.2f}",
            audits=str(p.audits or "-"),
        )
        for p in sorted(data.detailed, key=rank)
    ]


@dataclass(frozen=True)
class MethodLine:
    """A method: its trials, and its best audited candidate. on_front: how many of its candidates are on the overall front."""

    method: str
    colour: str
    trials: str
    seconds: str
    audited: int
    on_front: int
    best: str
    residue: str
    damage: str


def method_lines(data: ReportData) -> list[MethodLine]:
    """The methods of the sweep, in its order."""
    lines = []
    for method in data.sweep.methods:
        trials = [t for t in data.trials if t.method == method]
        complete = [t for t in trials if t.is_complete]
        audited = [p for p in data.candidates() if p.method == method]
        best = min(audited, key=lambda p: (p.worst, p.residue + p.damage), default=None)
        lines.append(
            MethodLine(
                method=method,
                colour=data.styles[method][0],
                trials=f"{len(complete)} of {len(trials)}",
                seconds=f"{sum(t.train_s or 0 for t in complete):.0f}",
                audited=len(audited),
                on_front=sum(bool(p.on_front) for p in audited),
                best=best.trial if best else "-",
                residue=best.in_brief("residue") if best else "-",
                damage=best.in_brief("damage") if best else "-",
            )
        )
    return lines


@dataclass(frozen=True)
class FailureLine:
    """The trials that failed for one reason."""

    trials: str
    reason: str


def failure_lines(data: ReportData) -> list[FailureLine]:
    """The reasons for which trials failed, the most frequent first, at most `REASONS`."""
    by_reason: dict[str, list[str]] = {}
    for t in data.trials:
        if t.has_failed:
            by_reason.setdefault(t.reason, []).append(t.trial)
    groups = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    lines = [FailureLine(listed(trials), reason) for reason, trials in groups[:REASONS]]
    if len(groups) > REASONS:
        rest = sum(len(trials) for _, trials in groups[REASONS:])
        lines.append(FailureLine(f"{rest} more", f"{len(groups) - REASONS} other reasons, in trials.parquet"))
    return lines


@dataclass(frozen=True)
class ViewLine:
    """A view of the residue, as the base and the oracles measured it."""

    metric: str
    base: str
    oracle: str
    used: str


def view_lines(data: ReportData) -> list[ViewLine]:
    """The views of the task, the unused ones with the reason."""
    return [
        ViewLine(
            metric=view["metric"],
            base="-" if view["base"] is None else f"{view['base']:.4g}",
            oracle="-" if view["oracle"] is None else f"{view['oracle']:.4g}",
            used="yes" if view["informative"] else f"no: {view['reason']}",
        )
        for view in data.anchors["views"]
    ]


@dataclass(frozen=True)
class CheckLine:
    """One metric of one audited model. note: the interval's method, why there is none, what limits the check."""

    metric: str
    value: str
    n: int | None
    interval: str
    to_oracle: str
    to_base: str
    direction: str
    status: str
    note: str


@dataclass(frozen=True)
class Sheet:
    """The audit sheet of a model: every check with its interval and its paired differences."""

    trial: str
    method: str
    standing: str
    lines: list[CheckLine]


def sheets(data: ReportData) -> list[Sheet]:
    """The audit sheets of the models that are shown in detail."""
    points = {p.trial: p for p in data.detailed}
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in data.rows:
        if row["tier"] == "audit" and not row["paired_with"]:
            rows.setdefault(row["subject"], []).append(row)
    return [_sheet(data, subject, points.get(subject), rows.get(subject, ())) for subject in data.subjects]


def _sheet(data: ReportData, subject: str, point: FrontRow | None, rows: Iterable[Mapping[str, Any]]) -> Sheet:
    standing = []
    if point is not None and point.is_candidate:
        standing.append(data.front["standing"][subject])
        if point.over_forgetting > OVER_FORGOTTEN:
            standing.append("over-forgotten, which counts as damage")
    method = (point.method if point else "") or "anchor"
    return Sheet(subject, method, "; ".join(standing), [_check_line(data, subject, row) for row in rows])


def _check_line(data: ReportData, subject: str, row: Mapping[str, Any]) -> CheckLine:
    metric = f"{row['check']}.{row['metric']}"
    return CheckLine(
        metric=metric,
        value=value(row) if row["status"] == "ok" else row["status"],
        n=row["n"],
        interval="-" if row["lo"] is None else f"{row['lo']:.3g} to {row['hi']:.3g}",
        to_oracle=_difference(data.metric(subject, metric, "oracle")),
        to_base=_difference(data.metric(subject, metric, "base")),
        direction=row["direction"],
        status=row["status"],
        note=_note(row, caveat(data.kind, metric)),
    )


def _note(row: Mapping[str, Any], limit: str) -> str:
    if row["status"] != "ok":
        return str(row["reason"])
    interval = "" if row["interval"] == "none" else row["interval"]
    return "; ".join(filter(None, (interval, row["reason"], limit)))


@dataclass(frozen=True)
class TableLine:
    """A line of a table with a column per model or run."""

    name: str
    cells: list[str]


@dataclass(frozen=True)
class Attacks:
    """Presence after each attack by subject, the verdicts as (subject, sentence), and what gave no verdict."""

    subjects: list[str]
    lines: list[TableLine]
    verdicts: list[tuple[str, str]]
    gaps: list[str]


def attacks(data: ReportData) -> Attacks:
    """The durability tier: each attack at each strength, "no attack" first."""
    attacked = {row["subject"] for row in data.rows if row["tier"] == "durability"}
    subjects = [name for name in data.subjects if name in attacked]
    measured = {
        (row["subject"], row["check"], row["metric"]): row
        for row in data.rows
        if row["tier"] == "durability" and not row["paired_with"] and row["status"] == "ok"
    }
    lines = [
        TableLine(
            "no attack" if strength == "none" else f"{check} {strength}",
            [_presence(measured, subject, check, strength) for subject in subjects],
        )
        for check, strength in _strengths(measured)
    ]
    shown, front = set(data.subjects), data.front
    verdicts = [(name, v["sentence"]) for name, v in front.get("verdicts", {}).items() if name in shown]
    gaps = [f"{name}: {reason}." for name, reason in front.get("attacks_without_verdict", {}).items() if name in shown]
    return Attacks(subjects, lines, verdicts, gaps)


def _strengths(measured: Iterable[tuple[str, str, str]]) -> list[tuple[str, str]]:
    """(attack, strength) of every measured presence; of several values without an attack, that of `relearning`."""
    pairs = set()
    for _, check, metric in measured:
        kind, _, strength = metric.partition("@")
        if kind == "presence" and strength and (strength != "none" or check == "relearning"):
            pairs.add((check, strength))
    return sorted(pairs, key=lambda pair: (pair[1] != "none", pair))


def _presence(
    measured: Mapping[tuple[str, str, str], Mapping[str, Any]], subject: str, check: str, strength: str
) -> str:
    """A subject's presence after an attack; behind it, except for oracles, the excess with its 95 % interval."""
    presence = measured.get((subject, check, f"presence@{strength}"))
    excess = measured.get((subject, check, f"excess@{strength}"))
    text = "-" if presence is None else f"{presence['value']:.2f}"
    if excess is not None and not subject.startswith("oracle"):
        ends = "" if excess["lo"] is None else f", {excess['lo']:.2f} to {excess['hi']:.2f}"
        text += f" (excess {excess['value']:+.2f}{ends})"
    return text


def value(row: Mapping[str, Any] | None) -> str:
    """A row's value for a table."""
    return "-" if row is None or row["value"] is None else f"{row['value']:.3g}"


def _difference(row: Mapping[str, Any] | None) -> str:
    """A paired difference with its 95 % interval in brackets; the column's head says so."""
    if row is None or row["value"] is None:
        return "-"
    return f"{row['value']:+.3g}" + ("" if row["lo"] is None else f" ({row['lo']:.3g} to {row['hi']:.3g})")
