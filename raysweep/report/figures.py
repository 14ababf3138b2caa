"""The report's figures: plotly for the page, matplotlib for the PNG files."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from matplotlib.figure import Figure
from plotly.subplots import make_subplots

from raysweep.report.data import COLOURS, ReportData
from raysweep.results.front_row import OBJECTIVES, FrontRow, Objective
from raysweep.results.trials import Trial, points_of
from raysweep.storage.files import write_bytes

GREY, GRID = "#7a828c", "rgba(128,128,128,0.25)"
ANCHORS = {"base": "star", "oracle": "star-diamond", "destroyed": "x"}
RESIDUE, DAMAGE = "residue (0 like the oracle, 1 like the base)", "damage (0 like the oracle, 1 destroyed)"
Z95 = 1.96


def front(data: ReportData) -> go.Figure:
    """Residue against damage: search estimates hollow, audited values filled with 95 % whiskers, anchors as stars."""
    figure = go.Figure()
    for method, (colour, symbol) in data.styles.items():
        tried = [t for t in data.trials if t.method == method and t.is_complete]
        figure.add_scatter(
            x=[t.residue for t in tried], y=[t.damage for t in tried], mode="markers", legendgroup=method,
            showlegend=False, hovertext=[f"{t.trial} (search)<br>{_settings(t)}" for t in tried], hoverinfo="text",
            marker={"symbol": symbol + "-open", "color": colour, "size": 7, "opacity": 0.45},
        )  # fmt: skip
        mine = sorted((p for p in data.candidates() if p.method == method), key=lambda p: p.residue)
        if not mine:
            continue
        own = [p for p in mine if p.on_method_front]
        figure.add_scatter(
            x=[p.residue for p in own], y=[p.damage for p in own], mode="lines", legendgroup=method,
            showlegend=False, hoverinfo="skip", line={"color": colour, "width": 1, "dash": "dot", "shape": "hv"},
        )  # fmt: skip
        figure.add_scatter(
            x=[p.residue for p in mine], y=[p.damage for p in mine], mode="markers", name=method,
            legendgroup=method, hovertext=[f"{p.trial} (audit)<br>{_settings(p)}" for p in mine], hoverinfo="text",
            error_x=_whisker(mine, "residue", colour), error_y=_whisker(mine, "damage", colour),
            marker={"symbol": symbol, "color": colour, "size": 11, "line": {"width": 1, "color": GREY}},
        )  # fmt: skip
    members = sorted((p for p in data.candidates() if p.on_front), key=lambda p: p.residue)
    figure.add_scatter(
        x=[p.residue for p in members], y=[p.damage for p in members], mode="lines", name="front",
        line={"color": GREY, "width": 2, "shape": "hv"}, hoverinfo="skip",
    )  # fmt: skip
    for p in data.points:
        if not p.is_candidate:
            symbol = ANCHORS[p.trial.split("-")[0]]
            figure.add_scatter(
                x=[p.residue], y=[p.damage], mode="markers+text", text=[p.trial], textposition="top center",
                marker={"symbol": symbol, "size": 13, "color": GREY}, name=p.trial, showlegend=False,
                textfont={"color": GREY, "size": 11},
            )  # fmt: skip
    return _style(figure, RESIDUE, DAMAGE, 470)


def attainment(bands: dict[str, dict[float, np.ndarray]]) -> go.Figure:
    """Median attainment surface of each method with the band from 25 to 75 % of its sweeps, one panel per method."""
    across = min(3, max(1, len(bands)))
    down = -(-len(bands) // across)
    figure = make_subplots(
        down, across, subplot_titles=list(bands), shared_xaxes="all", shared_yaxes="all", vertical_spacing=0.25 / down
    )
    for k, (method, surfaces) in enumerate(bands.items()):
        colour = COLOURS[k % len(COLOURS)]
        for share, corners in surfaces.items():
            x, y = _staircase(corners)
            figure.add_scatter(
                x=x, y=y, mode="lines", hovertext=f"{method}: {share:.0%} of sweeps", hoverinfo="text", showlegend=False,
                line={"color": colour, "width": 2.5 if share == 0.5 else 1, "shape": "hv",
                      "dash": "solid" if share == 0.5 else "dot"},
                row=k // across + 1, col=k % across + 1,
            )  # fmt: skip
    for k in range(len(bands)):
        below = k + across >= len(bands)  # nothing stands under this panel
        figure.update_xaxes(
            title_text=RESIDUE if below else None, showticklabels=below, row=k // across + 1, col=k % across + 1
        )
    figure.update_yaxes(title_text=DAMAGE, col=1)
    figure.update_xaxes(range=[-0.03, 1.1])
    figure.update_yaxes(range=[-0.03, 1.1])
    return _style(figure, None, None, 80 + 290 * down)


def _staircase(corners: np.ndarray) -> tuple[list[float], list[float]]:
    """The corners of a surface with its two ends at the edge of the picture."""
    if not len(corners):
        return [], []
    x, y = corners[:, 0].tolist(), corners[:, 1].tolist()
    return [x[0], *x, 1.1], [1.1, *y, y[-1]]


def optimism(data: ReportData) -> go.Figure:
    """What the search saw against what the audit found, one line per candidate and objective."""
    figure = make_subplots(1, 2, subplot_titles=("residue", "damage"))
    for column, key in enumerate(OBJECTIVES, 1):
        for p in data.candidates():
            colour, symbol = data.styles[p.method]
            figure.add_scatter(
                x=["search", "audit"], y=[p.probe(key), p.value(key)], mode="lines+markers", hovertext=p.trial,
                hoverinfo="text+y", line={"color": colour, "width": 1.5}, marker={"symbol": symbol, "size": 8},
                showlegend=False, row=1, col=column,
            )  # fmt: skip
        figure.update_yaxes(title_text=key, row=1, col=column)
    figure.update_xaxes(title_text="measured by", categoryorder="array", categoryarray=["search", "audit"])
    return _style(figure, None, None, 340)


def effects(data: ReportData) -> go.Figure:
    """Each searched hyperparameter against residue and damage, small multiples, one colour per method."""
    found: dict[str, list[tuple[str, Any, float, float]]] = {}
    for t in data.trials:
        if t.is_complete:
            for name, value in t.hyperparameters.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    found.setdefault(name, []).append((t.method, value, *t.point))
    names = [n for n, points in found.items() if len({v for _, v, _, _ in points}) > 2]
    if not names:
        return _style(go.Figure(), None, None, 200)
    figure = make_subplots(2, len(names), shared_xaxes=True, vertical_spacing=0.06, horizontal_spacing=0.05)
    for column, name in enumerate(names, 1):
        for row, objective in enumerate(("residue", "damage"), 1):
            for method, (colour, symbol) in data.styles.items():
                mine = [p for p in found[name] if p[0] == method]
                figure.add_scatter(
                    x=[p[1] for p in mine], y=[p[1 + row] for p in mine], mode="markers", showlegend=False,
                    marker={"color": colour, "symbol": symbol, "size": 7}, hovertext=method, row=row, col=column,
                )  # fmt: skip
            if column == 1:
                figure.update_yaxes(title_text=objective, row=row, col=1)
        figure.update_xaxes(type="log", row=1, col=column)
        figure.update_xaxes(type="log", title_text=name, row=2, col=column)
    return _style(figure, None, None, 420)


def roc(data: ReportData) -> go.Figure:
    """The loss attack on forgotten and on retained images against their holdouts, log axes, with the chance line."""
    kinds = [("forget", "forget_holdout", "forgotten images"), ("retain", "holdout", "retained images")]
    figure = make_subplots(1, 2, subplot_titles=[title for *_, title in kinds])
    for column, (kind, against, _) in enumerate(kinds, 1):
        for p in data.points:
            calibration = data.scores.get((p.trial, "loss.calibration"))
            if calibration is None or p.trial == "destroyed":
                continue
            step, sign = int(calibration[0][0]), calibration[0][1]
            pos, neg = (sign * data.scores[(p.trial, f"loss.{part}")][:, step] for part in (kind, against))
            fpr, tpr = _curve(pos, neg)
            anchor = not p.is_candidate
            colour = GREY if anchor else data.styles[p.method][0]
            figure.add_scatter(
                x=fpr, y=tpr, mode="lines", name=p.trial, legendgroup=p.trial, showlegend=column == 2,
                line={"color": colour, "width": 2.5 if anchor else 1.2, "dash": "dash" if p.trial == "base" else "solid"},
                row=1, col=column,
            )  # fmt: skip
        figure.add_scatter(
            x=[1e-2, 1], y=[1e-2, 1], mode="lines", line={"color": GREY, "dash": "dot", "width": 1}, showlegend=False,
            hoverinfo="skip", row=1, col=column,
        )  # fmt: skip
    figure.update_xaxes(type="log", title_text="false positive rate")
    figure.update_yaxes(type="log", title_text="true positive rate", col=1)
    return _style(figure, None, None, 400)


def write_pngs(data: ReportData, folder: Path) -> None:
    """Writes front.png, the front as in the page."""
    figure = Figure(figsize=(7, 5), dpi=140, layout="constrained")
    axes = figure.subplots()
    markers = ("o", "s", "D", "^", "P", "p", "h", "v")
    for i, (method, (colour, _)) in enumerate(data.styles.items()):
        tried = [t for t in data.trials if t.method == method and t.is_complete]
        axes.scatter(*points_of(tried).T, s=18, facecolors="none",
                     edgecolors=colour, alpha=0.5, marker=markers[i % 8])  # fmt: skip
        mine = [p for p in data.candidates() if p.method == method]
        axes.errorbar([p.residue for p in mine], [p.damage for p in mine],
                      xerr=[Z95 * p.residue_se for p in mine], yerr=[Z95 * p.damage_se for p in mine],
                      fmt=markers[i % 8], color=colour, label=method, capsize=2, markersize=7)  # fmt: skip
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


def _curve(pos: np.ndarray, neg: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ROC by all thresholds, without interpolation, at false positive rates above zero."""
    thresholds = np.unique(np.concatenate([pos, neg]))[::-1]
    fpr = np.array([(neg >= t).mean() for t in thresholds])
    tpr = np.array([(pos >= t).mean() for t in thresholds])
    seen = (fpr > 0) & (tpr > 0)
    return fpr[seen], tpr[seen]


def _whisker(points: list[FrontRow], objective: Objective, colour: str) -> dict[str, Any]:
    return {
        "type": "data",
        "array": [Z95 * p.se(objective) for p in points],
        "color": colour,
        "thickness": 1.2,
        "width": 3,
    }


def _settings(row: FrontRow | Trial) -> str:
    values = row.hyperparameters
    return "<br>".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())


def _style(figure: go.Figure, x: str | None, y: str | None, height: int) -> go.Figure:
    figure.update_layout(
        height=height, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "color": GREY, "size": 13},
        margin={"l": 60, "r": 15, "t": 35, "b": 50}, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    )  # fmt: skip
    figure.update_xaxes(gridcolor=GRID, zerolinecolor=GRID)
    figure.update_yaxes(gridcolor=GRID, zerolinecolor=GRID)
    if x:
        figure.update_xaxes(title_text=x)
    if y:
        figure.update_yaxes(title_text=y)
    return figure
