"""Builds the self-contained HTML report of a run, and its PNG figures. Needs neither Ray nor a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from raysweep.registry import external, provider, resolve
from raysweep.report import figures
from raysweep.report.contents import page_context
from raysweep.report.data import gather
from raysweep.rundir import RunDir
from raysweep.storage.files import write_bytes


def build(folder: RunDir) -> Path:
    """Writes report.html and figures/ from the tables of a run in any state; returns the report's path."""
    data = gather(folder)
    plots = {
        "front_figure": figures.front(data),
        "optimism_figure": figures.optimism(data),
        "effects_figure": figures.effects(data),
        "roc_figure": figures.roc(data),
    }
    template = environment().get_template("report.html.j2")
    html = template.render(
        page_context(data) | {name: embed(figure) for name, figure in plots.items()},
        plotly=Markup(get_plotlyjs()),
        added_sections=added_sections(folder),
    )
    write_bytes(folder.report, html.encode())
    figures.write_pngs(data, folder.figures)
    return folder.report


@dataclass(frozen=True)
class AddedSection:
    """A section of another package, `provider`."""

    name: str
    provider: str
    html: Markup


def added_sections(folder: RunDir) -> list[AddedSection]:
    """The sections of other packages, by name: functions of the run's directory that return HTML, "" to show nothing."""
    sections = []
    for name, points in sorted(external("section").items()):
        try:
            html = resolve("section", name)(folder)
        except Exception as error:  # a plugin may raise anything; the rest of the report is still written
            html = escape(f"It could not be made: {type(error).__name__}: {error}")
        if html:
            sections.append(AddedSection(name, provider(points[0]), Markup(html)))
    return sections


def environment() -> Environment:
    """The templates of reports and comparisons. Text is escaped, and a name that is missing is an error."""
    loader = PackageLoader("raysweep.report")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def embed(figure: go.Figure) -> Markup:
    """The figure as a div that fills its column; plotly escapes what it embeds."""
    return Markup(
        figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True})
    )
