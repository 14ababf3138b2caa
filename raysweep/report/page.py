"""Builds the self-contained HTML report of a run, and its PNG figures. Needs neither Ray nor a GPU."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from raysweep.report import figures
from raysweep.report.data import gather, page_context
from raysweep.rundir import RunDir
from raysweep.storage.files import write_bytes


def build(folder: RunDir) -> Path:
    """Writes report.html and figures/ from the run's tables, whatever state it is in, and returns the report's path."""
    data = gather(folder)
    drawn = {
        "front_figure": figures.front(data),
        "optimism_figure": figures.optimism(data),
        "effects_figure": figures.effects(data),
        "roc_figure": figures.roc(data),
    }
    environment = Environment(
        loader=PackageLoader("raysweep.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    html = environment.get_template("report.html.j2").render(
        page_context(data) | {name: embed(figure) for name, figure in drawn.items()}, plotly=Markup(get_plotlyjs())
    )
    write_bytes(folder.report, html.encode())
    figures.write_pngs(data, folder.figures)
    return folder.report


def embed(figure: go.Figure) -> Markup:
    """The figure as a div that fills its column; plotly escapes what it embeds."""
    return Markup(
        figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True})
    )
