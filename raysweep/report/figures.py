"""The report's figures: plotly for the page, matplotlib for the PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plotly.subplots import make_subplots

from raysweep.report.data import COLOURS, ReportData
from raysweep.results import pareto
from raysweep.results.front_row import OBJECTIVES, FrontRow, Objective
from raysweep.results.trials import Trial, points_of
from raysweep.storage.files import write_bytes

GREY, GRID = "#7a828c", "rgba(128,128,128,0.25)"
ANCHORS = {"base": "star", "oracle": "star-diamond", "destroyed": "x"}
MARKERS = ("o", "s", "D", "^", "P", "p", "h", "v")  # of matplotlib, one per method
RESIDUE, DAMAGE = "residue (0 like the oracle, 1 like the base)", "damage (0 like the oracle, 1 destroyed)"
EDGE = 1.1  # of the axes of residue and damage, or more if audited models lie beyond
COLUMNS = 5  # hyperparameters side by side
DRAWN = 2000  # trials in a figure, all methods together: more hide one another, and browsers become slow
SPLITS = (("forget", "forget_holdout", "forgotten images"), ("retain", "holdout", "retained images"))


def front(data: ReportData) -> go.Figure:
    """Residue against damage: search estimates hollow, audited values filled with 95 % whiskers, anchors as stars."""
    figure = go.Figure()
    for method, trials in drawn(data).items():
        _add_method(figure, data, method, trials)
    members = sorted((p for p in data.candidates() if p.on_front), key=lambda p: p.residue)
    line = {"color": GREY, "width": 2, "shape": "hv"}
    figure.add_scatter(**_xy(members), mode="lines", name="front", line=line, hoverinfo="skip")
    for p in data.points:
        if not p.is_candidate:
            figure.add_scatter(
                **_xy([p]),
                mode="markers+text",
                text=[p.trial],
                textposition="top center",
                textfont={"color": GREY, "size": 11},
                marker={"symbol": ANCHORS[p.trial.split("-")[0]], "size": 13, "color": GREY},
                name=p.trial,
                showlegend=False,
            )
    for axes, objective in zip((figure.update_xaxes, figure.update_yaxes), OBJECTIVES, strict=True):
        ends = [p.interval(objective)[1] for p in data.detailed]  # estimates of bad trials may lie far beyond
        axes(range=[-0.05, 1.05 * max([EDGE, *ends])])
    return _style(figure, RESIDUE, DAMAGE, 470)


def drawn(data: ReportData) -> dict[str, list[Trial]]:
    """Method -> its completed trials in figures: all, or, of too many, its front by the probe and an even share of the others."""
    most = max(1, DRAWN // len(data.styles))
    return {method: _thinned(data.completed(method), most) for method in data.styles}


def _thinned(trials: Sequence[Trial], most: int) -> list[Trial]:
    if len(trials) <= most:
        return list(trials)
    kept = {*pareto.front(points_of(trials), ("min", "min"))[:most]}
    others = [k for k in range(len(trials)) if k not in kept]
    kept |= {others[int(k)] for k in np.linspace(0, len(others) - 1, most - len(kept))}
    return [trials[k] for k in sorted(kept)]


def drawn_in_words(data: ReportData) -> str:
    """A sentence on which trials figures leave out; "" if none."""
    complete, shown = sum(t.is_complete for t in data.trials), sum(map(len, drawn(data).values()))
    if shown == complete:
        return ""
    return (
        f"{shown} of {complete} completed trials are drawn: each method's front by the probe, and of its others an even share over the "
        "search."
    )


def _add_method(figure: go.Figure, data: ReportData, method: str, trials: Sequence[Trial]) -> None:
    """Adds a method's search estimates, its own front and its audited candidates, those that are shown in detail with whiskers."""
    colour, symbol = data.styles[method]
    common: dict[str, Any] = {"legendgroup": method}
    figure.add_scatter(
        **_columns(points_of(trials)),
        mode="markers",
        marker={"symbol": f"{symbol}-open", "color": colour, "size": 7, "opacity": 0.45},
        hovertext=[f"{t.trial} (search)<br>{_settings(t)}" for t in trials],
        hoverinfo="text",
        showlegend=False,
        **common,
    )
    audited = sorted((p for p in data.candidates() if p.method == method), key=lambda p: p.residue)
    if not audited:
        return
    line = {"color": colour, "width": 1, "dash": "dot", "shape": "hv"}
    members = [p for p in audited if p.on_method_front]
    figure.add_scatter(**_xy(members), mode="lines", line=line, hoverinfo="skip", showlegend=False, **common)
    detailed = [p for p in data.detailed if p.method == method]
    names = {p.trial for p in detailed}
    figure.add_scatter(
        **_xy([p for p in audited if p.trial not in names]),
        mode="markers",
        marker={"symbol": symbol, "color": colour, "size": 5},
        hoverinfo="skip",
        showlegend=False,
        **common,
    )
    figure.add_scatter(
        **_xy(detailed),
        mode="markers",
        marker={"symbol": symbol, "color": colour, "size": 11, "line": {"width": 1, "color": GREY}},
        error_x=_whisker(detailed, "residue", colour),
        error_y=_whisker(detailed, "damage", colour),
        hovertext=[f"{p.trial} (audit)<br>{_settings(p)}" for p in detailed],
        hoverinfo="text",
        name=method,
        **common,
    )


def _columns(points: np.ndarray) -> dict[str, np.ndarray]:
    """The coordinates of points (n, 2) as a figure takes them, in single precision, which the page holds in a quarter of the bytes."""
    x, y = points.astype(np.float32).T
    return {"x": x, "y": y}


def _xy(points: Sequence[FrontRow]) -> dict[str, np.ndarray]:
    return _columns(np.array([(p.residue, p.damage) for p in points]).reshape(-1, 2))


def attainment(bands: Mapping[str, Mapping[float, np.ndarray]]) -> go.Figure:
    """Median attainment surface of each method with the band from 25 to 75 % of its sweeps, one panel per method.

    bands: method -> share of sweeps -> corners (m, 2) of the region that they attain.
    """
    columns = min(3, max(1, len(bands)))
    rows = -(-len(bands) // columns)
    figure = make_subplots(
        rows, columns, subplot_titles=list(bands), shared_xaxes="all", shared_yaxes="all", vertical_spacing=0.25 / rows
    )
    for k, (method, surfaces) in enumerate(bands.items()):
        panel = {"row": k // columns + 1, "col": k % columns + 1}
        for share, corners in surfaces.items():
            x, y = _staircase(corners)
            is_median = share == 0.5
            line = {"width": 2.5 if is_median else 1, "dash": "solid" if is_median else "dot", "shape": "hv"}
            figure.add_scatter(
                x=x,
                y=y,
                mode="lines",
                line=line | {"color": COLOURS[k % len(COLOURS)]},
                hovertext=f"{method}: {share:.0%} of sweeps",
                hoverinfo="text",
                showlegend=False,
                **panel,
            )
        is_lowest = k + columns >= len(bands)
        figure.update_xaxes(title_text=RESIDUE if is_lowest else None, showticklabels=is_lowest, **panel)
    figure.update_yaxes(title_text=DAMAGE, col=1)
    figure.update_xaxes(range=[-0.03, EDGE])
    figure.update_yaxes(range=[-0.03, EDGE])
    return _style(figure, None, None, 80 + 290 * rows)


def _staircase(corners: np.ndarray) -> tuple[list[float], list[float]]:
    """The corners of a surface with its two ends at the edge of the picture."""
    if not len(corners):
        return [], []
    x, y = corners[:, 0].tolist(), corners[:, 1].tolist()
    return [x[0], *x, EDGE], [EDGE, *y, y[-1]]


def optimism(data: ReportData) -> go.Figure:
    """The objectives of the candidates in detail by the search and by the audit, joined by a line."""
    figure = make_subplots(1, 2, subplot_titles=OBJECTIVES)
    for column, objective in enumerate(OBJECTIVES, 1):
        for p in data.detailed:
            if not p.is_candidate:
                continue
            colour, symbol = data.styles[p.method]
            figure.add_scatter(
                x=["search", "audit"],
                y=[p.probe(objective), p.value(objective)],
                mode="lines+markers",
                line={"color": colour, "width": 1.5},
                marker={"symbol": symbol, "size": 8},
                hovertext=p.trial,
                hoverinfo="text+y",
                showlegend=False,
                row=1,
                col=column,
            )
        figure.update_yaxes(title_text=objective, row=1, col=column)
    figure.update_xaxes(title_text="measured by", categoryorder="array", categoryarray=["search", "audit"])
    return _style(figure, None, None, 340)


def effects(data: ReportData) -> go.Figure:
    """Each searched numeric hyperparameter against residue and, below, damage, one colour per method."""
    values: dict[str, dict[str, list[tuple[float, float, float]]]] = {}  # name -> method -> (value, residue, damage)
    for method, trials in drawn(data).items():
        for t in trials:
            for name, value in t.hyperparameters.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    values.setdefault(name, {}).setdefault(method, []).append((value, *t.point))
    names = [name for name, by_method in values.items() if len({v for t in by_method.values() for v, *_ in t}) > 2]
    if not names:
        return _style(go.Figure(), None, None, 200)
    bands = -(-len(names) // COLUMNS)
    figure = make_subplots(2 * bands, min(COLUMNS, len(names)), vertical_spacing=0.13 / bands, horizontal_spacing=0.05)
    for k, name in enumerate(names):
        band, column = divmod(k, COLUMNS)
        for method, points in values[name].items():
            x, *objectives = np.array(points, dtype=np.float32).T
            colour, symbol = data.styles[method]
            for row, y in enumerate(objectives, 2 * band + 1):
                figure.add_scatter(
                    x=x,
                    y=y,
                    mode="markers",
                    marker={"color": colour, "symbol": symbol, "size": 5, "opacity": 0.6},
                    hovertext=method,
                    showlegend=False,
                    row=row,
                    col=column + 1,
                )
        for row, objective in enumerate(OBJECTIVES, 2 * band + 1):
            title = name if objective == "damage" else None
            figure.update_xaxes(
                type="log", nticks=4, title_text=title, showticklabels=bool(title), row=row, col=column + 1
            )
            figure.update_yaxes(title_text=objective if column == 0 else None, row=row, col=column + 1)
    return _style(figure, None, None, 440 * bands)


def roc(data: ReportData) -> go.Figure:
    """The loss attack on forgotten and on retained images against their holdouts, log axes, with the chance line.

    A single forgotten image has no curve.
    """
    splits = [split for split in SPLITS if not (data.single and split[0] == "forget")]
    figure = make_subplots(1, len(splits), subplot_titles=[title for *_, title in splits])
    chance = {"color": GREY, "dash": "dot", "width": 1}
    for column, (members, holdout, _) in enumerate(splits, 1):
        for p in data.detailed:
            calibration = data.scores.get((p.trial, "loss.calibration"))
            if calibration is None or p.trial == "destroyed":
                continue
            step, sign = int(calibration[0][0]), calibration[0][1]
            positives, negatives = (
                sign * data.scores[p.trial, f"loss.{split}"][:, step] for split in (members, holdout)
            )
            fpr, tpr = _curve(positives, negatives)
            colour, width = (data.styles[p.method][0], 1.2) if p.is_candidate else (GREY, 2.5)
            figure.add_scatter(
                x=fpr,
                y=tpr,
                mode="lines",
                line={"color": colour, "width": width, "dash": "dash" if p.trial == "base" else "solid"},
                name=p.trial,
                legendgroup=p.trial,
                showlegend=column == len(splits),
                row=1,
                col=column,
            )
        diagonal = [1e-2, 1]
        figure.add_scatter(
            x=diagonal, y=diagonal, mode="lines", line=chance, showlegend=False, hoverinfo="skip", row=1, col=column
        )
    figure.update_xaxes(type="log", title_text="false positive rate")
    figure.update_yaxes(type="log", title_text="true positive rate", col=1)
    return _style(figure, None, None, 400)


def _curve(positives: np.ndarray, negatives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(false, true positive rates) at all thresholds, without interpolation, where both are above zero."""
    thresholds = np.unique(np.concatenate([positives, negatives]))[::-1]
    fpr = np.array([(negatives >= t).mean() for t in thresholds])
    tpr = np.array([(positives >= t).mean() for t in thresholds])
    shown = (fpr > 0) & (tpr > 0)
    return fpr[shown], tpr[shown]


def write_pngs(data: ReportData, folder: Path) -> None:
    """Writes front.png, the front as on the page."""
    figure = Figure(figsize=(7, 5), dpi=140, layout="constrained")
    axes = figure.subplots()
    for i, (method, trials) in enumerate(drawn(data).items()):
        _draw_method(axes, data, method, trials, MARKERS[i % len(MARKERS)])
    members = sorted((p for p in data.candidates() if p.on_front), key=lambda p: p.residue)
    axes.step([p.residue for p in members], [p.damage for p in members], where="post", color="grey", lw=1.5)
    for p in data.points:
        if not p.is_candidate:
            axes.scatter(p.residue, p.damage, marker="*", s=130, color="black")
            axes.annotate(p.trial, (p.residue, p.damage), textcoords="offset points", xytext=(5, 5), fontsize=8)
    axes.set_xlabel(RESIDUE)
    axes.set_ylabel(DAMAGE)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    out = BytesIO()
    figure.savefig(out, format="png")
    write_bytes(folder / "front.png", out.getvalue())


def _draw_method(axes: Axes, data: ReportData, method: str, trials: Sequence[Trial], marker: str) -> None:
    """Draws a method's search estimates hollow, and its audited candidates in detail filled with 95 % whiskers."""
    colour, _ = data.styles[method]
    residue, damage = points_of(trials).T
    axes.scatter(residue, damage, s=18, facecolors="none", edgecolors=colour, alpha=0.5, marker=marker)
    audited = [p for p in data.detailed if p.method == method]
    axes.errorbar(
        [p.residue for p in audited],
        [p.damage for p in audited],
        xerr=_ends(audited, "residue"),
        yerr=_ends(audited, "damage"),
        fmt=marker,
        color=colour,
        label=method,
        capsize=2,
        markersize=7,
    )


def _whisker(points: Sequence[FrontRow], objective: Objective, colour: str) -> dict[str, Any]:
    below, above = _ends(points, objective)
    ends = {"array": above.tolist(), "arrayminus": below.tolist(), "symmetric": False}
    return {"type": "data", **ends, "color": colour, "thickness": 1.2, "width": 3}


def _ends(points: Sequence[FrontRow], objective: Objective) -> np.ndarray:
    """How far the 95 % intervals of an objective reach below and above it, (2, points)."""
    ends = [
        (p.value(objective) - p.interval(objective)[0], p.interval(objective)[1] - p.value(objective)) for p in points
    ]
    return np.array(ends).reshape(-1, 2).T.clip(min=0.0)


def _settings(row: FrontRow | Trial) -> str:
    """The hyperparameters of a candidate, a line each."""
    values = row.hyperparameters
    return "<br>".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())


def _style(figure: go.Figure, x: str | None, y: str | None, height: int) -> go.Figure:
    """The figure in the page's colours, with titles of its axes if they are given."""
    figure.update_layout(
        height=height,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "color": GREY, "size": 13},
        margin={"l": 60, "r": 15, "t": 35, "b": 50},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    )
    figure.update_xaxes(gridcolor=GRID, zerolinecolor=GRID)
    figure.update_yaxes(gridcolor=GRID, zerolinecolor=GRID)
    if x:
        figure.update_xaxes(title_text=x)
    if y:
        figure.update_yaxes(title_text=y)
    return figure
