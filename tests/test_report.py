"""The report in every state of a run, veils over sensitive pictures, and comparisons that count each run once."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from finished import LIKE, REMEMBERS, front, row, run
from PIL import Image

from raysweep.auditing.anchors import View
from raysweep.cli import main
from raysweep.report.page import build
from raysweep.report.pictures import SIDE, address, veiled
from raysweep.rundir import RunDir
from raysweep.storage.files import write_json
from raysweep.tasks.records import Tally

GOOD, OTHER = row("000-rgd", 0.05, 0.2), row("001-siss", 0.02, 0.6)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Pictures(HTMLParser):
    """Every image of a page, and whether it is inside a veil."""

    def __init__(self, html: str):
        super().__init__()
        self.depth, self.images = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag == "section":
            self.depth.append("veil" in (attributes.get("class") or ""))
        if tag == "img":
            self.images.append((any(self.depth), attributes))

    def handle_endtag(self, tag):
        if tag == "section":
            self.depth.pop()


def pixels(address: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(base64.b64decode(address.partition("base64,")[2]))))


def test_sensitive_pictures_are_mosaics_until_clicked_in_every_medium(tmp_path):
    html = build(run(tmp_path / "a", front([GOOD], {"000-rgd": LIKE}), sensitive=True)).read_text()
    images = Pictures(html).images
    assert len(images) == 1 + 1 + 2 + 2  # what must be forgotten, its noised form, rebuilt, samples
    for in_veil, image in images:
        assert in_veil
        shown, hidden = pixels(image["src"]), pixels(image["data-other"])
        assert shown.shape == hidden.shape
        assert len(np.unique(shown)) < len(np.unique(hidden)) or len(np.unique(hidden)) <= 3
    style = html[html.index("<style>") : html.index("</style>")]
    assert re.findall(r"([^{}]*)\{[^{}]*filter: none", style) == [" .veil.shown img "]  # only what was clicked is sharp
    assert "@media print" in style
    assert "filter" not in style[style.index("@media print") :]
    assert "reveal" not in html[html.index('addEventListener("beforeprint"') :].partition("</script>")[0]


def test_pictures_that_are_not_sensitive_are_shown(tmp_path):
    images = Pictures(build(run(tmp_path / "a", front([GOOD]))).read_text()).images
    assert images
    assert not any(in_veil or "data-other" in image for in_veil, image in images)


def test_a_veil_keeps_only_means():
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 64, 48)).astype(np.float32)
    hidden = veiled(images)
    assert hidden.shape == images.shape
    assert len(np.unique(hidden[0, 0])) == 16
    np.testing.assert_allclose(hidden[1, 2, :16, :12], images[1, 2, :16, :12].mean(), rtol=1e-5)
    assert len(np.unique(veiled(images[:1, :1, :8, :8]))) == 4


def test_small_pictures_are_enlarged_and_large_ones_reduced():
    rng = np.random.default_rng(0)
    assert pixels(address(np.zeros((2, 1, 8, 8)))).shape == (40, 2 * 45)  # with a line between them
    assert pixels(address(np.zeros((1, 3, 32, 32)))).shape == (SIDE, SIDE + 5, 3)
    large = address(rng.uniform(-1, 1, (8, 3, 512, 768)).astype(np.float32))
    height, width, _ = pixels(large).shape
    assert (height, width) == pytest.approx((512 / 768 * SIDE, 8 * SIDE), rel=0.01)
    assert len(large) < 300_000


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None or shutil.which("pdftoppm") is None, reason="needs chromium and poppler-utils")
def test_print_shows_no_sensitive_picture(tmp_path):
    """Every picture of the page is a chequerboard: none of its edges may be left in the PDF."""
    home = run(tmp_path / "a", front([GOOD], {"000-rgd": LIKE}), sensitive=True)
    contrasts = {}
    for name, html in (("veiled", build(home).read_text()), ("clear", None)):
        if html is None:
            html = re.sub(r'src="[^"]*" data-other="([^"]*)"', r'src="\1"', build(home).read_text()).replace(
                'class="veil"', ""
            )
        (tmp_path / f"{name}.html").write_text(html)
        printed = ["--headless", "--no-sandbox", "--disable-gpu", f"--print-to-pdf={tmp_path / name}.pdf"]
        subprocess.run(
            [str(CHROMIUM), *printed, f"file://{tmp_path / name}.html"], check=True, capture_output=True, timeout=120
        )
        subprocess.run(["pdfimages", "-png", f"{tmp_path / name}.pdf", str(tmp_path / name)], check=True, timeout=60)
        kept = [np.array(Image.open(p).convert("L"), float) for p in tmp_path.glob(f"{name}-*.png")]
        contrasts[name] = max((np.abs(np.diff(k, axis=1)).mean() for k in kept), default=0.0)
    assert contrasts["clear"] > 2 * contrasts["veiled"]


@pytest.mark.parametrize(("of", "entries", "badges", "first"), [
    (None, {"state": "failed", "reason": "no view tells the base from the oracles"}, ["FAILED"], "The run failed: no view tells the base from the oracles. No candidate is recommended."),
    (None, {"state": "interrupted"}, ["NOT FINISHED"], "The run has not finished its audit (state: interrupted; 0 of 4 trials ended). No candidate is recommended"),
    (front([]), {"state": "incomplete", "incomplete": ["000-rgd: no answer within 600 s"]}, ["INCOMPLETE"], "No candidate is recommended, because none was audited."),
    (front([GOOD]), {"state": "failed", "reason": "Ray did not start"}, ["FAILED"], "The run failed: Ray did not start. The results below are from the previous attempt."),
    (front([GOOD]), {"state": "interrupted"}, ["NOT FINISHED"], "The run was resumed and interrupted"),
    (front([GOOD], {"000-rgd": REMEMBERS}), {}, [], "No candidate is recommended. Best so far is 000-rgd: it has not forgotten"),
    (front([GOOD, OTHER], {"000-rgd": LIKE}), {}, [], "Recommended: 000-rgd"),
])  # fmt: skip
def test_the_first_screen_is_true_in_every_state(tmp_path, of, entries, badges, first):
    html = build(run(tmp_path / "a", of, **entries)).read_text()
    assert re.findall(r'class="badge">([^<]*)<', html) == badges
    lines = re.findall(r"<p>([^<]*)</p>", html[html.index('<section class="answer"') : html.index("</section>")])
    assert lines[0].startswith(first)
    assert ("Recommended" in html) == (of is not None and of.choice.recommended is not None)
    for anchor in re.findall(r'<a href="#([a-z]+)"', html):
        assert f'id="{anchor}"' in html
    for reason in (entries.get("reason", ""), *entries.get("incomplete", [])):
        assert reason in html
    if of is None:
        assert "Hypervolume" not in html
    if of is not None and len(of.candidates) == 1:
        assert "It is the only candidate that was audited" in html
    assert "±" not in html


def test_a_report_mentions_no_second_judge_for_models_that_judge_themselves(tmp_path):
    clip, pixels_ = (
        build(run(tmp_path / name, front([GOOD]), family=family)).read_text()
        for name, family in (("a", "clip"), ("b", "pixel-ddpm"))
    )
    assert "a judge with other training data" not in clip
    assert "other labelled images and other prompts" in clip
    assert "a judge with other training data" in pixels_
    assert 'id="membership"' not in clip + pixels_  # no attack on membership was made


def test_a_front_of_an_earlier_raysweep_is_refused_by_name(tmp_path):
    home = run(tmp_path / "a", front([GOOD]))
    content = json.loads(home.front_json.read_text())
    del content["answer"], content["best"]
    home.front_json.write_text(json.dumps(content))
    refused = call("report", str(home.path))
    assert refused.exit_code == 2
    assert "front.json: was written by an earlier raysweep" in refused.output


def call(*arguments: str):
    return CliRunner().invoke(main, list(arguments))


@pytest.fixture
def seeds(tmp_path) -> list[RunDir]:
    """Two sweeps that differ in their seeds, with other weights and results."""
    worse = [row("000-rgd", 0.15, 0.3), row("001-siss", 0.12, 0.7)]
    return [run(tmp_path / "one", front([GOOD, OTHER])), run(tmp_path / "two", front(worse), "search.seed=1")]


def compared(tmp_path: Path, *paths: Path):
    return call("report", "--compare", *map(str, paths), "--out", str(tmp_path / "page.html"))


def test_a_run_counts_once_under_any_name(seeds, tmp_path):
    one, two = (s.path for s in seeds)
    assert compared(tmp_path, one, two).exit_code == 0
    copy = Path(shutil.copytree(one, tmp_path / "copy"))
    link = tmp_path / "link"
    link.symlink_to(one)
    renamed = Path(shutil.copytree(one, tmp_path / "renamed"))
    config = renamed / "config.yaml"
    config.write_text(config.read_text().replace("name: one", "name: renamed").replace("seed: 0", "seed: 9", 1))
    rerun = run(tmp_path / "rerun", front([row("000-rgd", 0.3, 0.3)])).path
    for again, message in (
        (one, "is the same run as"),
        (link, "is the same run as"),
        (copy, "holds the same results as"),
        (renamed, "holds the same results as"),
        (rerun, "has the settings and seeds of"),
    ):
        for order in ((one, two, again), (again, two, one)):
            refused = compared(tmp_path, *order)
            assert refused.exit_code == 2, again
            assert message in refused.output
            assert "Traceback" not in refused.output


def test_equal_weights_under_other_results_are_the_same_candidates(seeds, tmp_path):
    from raysweep.storage.schemas import TRIALS, read_table, write_table

    other = run(tmp_path / "other", front([row("000-rgd", 0.2, 0.2), row("001-siss", 0.3, 0.1)]), "search.seed=7")
    write_table(other.trials, read_table(seeds[0].trials, TRIALS).to_pylist(), TRIALS)
    refused = compared(tmp_path, seeds[0].path, other.path)
    assert refused.exit_code == 2
    assert "holds the same candidates as" in refused.output


def test_a_comparison_names_axes_seeds_and_commits(seeds, tmp_path):
    from raysweep.report.compare import runs_table
    from raysweep.report.figures import attainment

    seeds[1].update(commit="f" * 40)
    table = runs_table(seeds)
    assert any(line.startswith("commit: ") for line in table.differences)
    assert not any("seed" in line for line in table.differences)
    axes = attainment(table.bands).layout
    assert {axes.xaxis.title.text, axes.xaxis2.title.text} == {"residue (0 like the oracle, 1 like the base)"}
    assert axes.yaxis.title.text == "damage (0 like the oracle, 1 destroyed)"
    assert compared(tmp_path, *(s.path for s in seeds)).exit_code == 0
    page = (tmp_path / "page.html").read_text()
    for part in (
        "search.seed 0",
        "search.seed 1",
        "audit.audit.seed None",
        "f" * 12,
        str(seeds[0].path),
        "No candidate",
    ):
        assert part in page or part == "No candidate", part
    twin = run(tmp_path / "deeper" / "one", front([row("000-rgd", 0.3, 0.3)]), "search.seed=3")
    assert runs_table([seeds[0], twin]).runs == [str(seeds[0].path), str(twin.path)]


def test_a_sweep_without_candidates_of_a_method_counts_in_its_attainment(seeds, tmp_path):
    from raysweep.report.compare import runs_table

    none = run(tmp_path / "none", front([dataclasses.replace(OTHER, residue=0.3)]), "search.seed=4")
    bands = runs_table([*seeds, none]).bands
    assert bands["rgd"][0.5][:, 0].max() == pytest.approx(0.15)  # two of three sweeps attain it
    assert len(bands["rgd"][0.75]) == 0  # not three


def test_every_axis_of_the_report_has_a_title(tmp_path):
    from raysweep.report import figures
    from raysweep.report.data import gather

    data = gather(run(tmp_path / "a", front([GOOD, OTHER])))
    for figure in (figures.front(data), figures.optimism(data), figures.roc(data)):
        axes = [a for name, a in figure.layout.to_plotly_json().items() if name.startswith("xaxis")]
        assert axes
        assert all(a.get("title", {}).get("text") for a in axes)
        assert figure.layout.yaxis.title.text


def test_intervals_of_a_concept_are_said_to_cover_the_audits_prompts_only(tmp_path):
    from raysweep.report.answer import not_tested
    from raysweep.report.data import gather

    data = gather(run(tmp_path / "a", front([GOOD, OTHER])))
    concept = dataclasses.replace(data.task, kind="concept", family="text-ddpm")
    sentences = {task.kind: not_tested(dataclasses.replace(data, task=task)) for task in (data.task, concept)}
    words = (
        "No prompts beyond the audit's are tried, such as paraphrases and other languages, and no interval covers them."
    )
    assert words in sentences["concept"]
    assert words not in sentences["points"]


def test_a_report_states_what_was_not_tested(tmp_path):
    from raysweep.auditing.untested import left_out, not_implemented
    from raysweep.report.data import gather

    folder = run(tmp_path / "a", front([GOOD, OTHER]))
    data, anchors = gather(folder), json.loads(folder.anchors("audit").read_text())
    reason = "base and oracle are both <0.1>"
    view = View("generation.rate", 0.1, 0.1, 0.0, False, reason)
    write_json(folder.anchors("audit"), anchors | {"views": [dataclasses.asdict(view)]})
    html = unescape(build(folder).read_text())
    tiers = {"audit": data.sweep.audit.audit, "durability": data.sweep.audit.durability}
    expected = [*left_out(data.task, tiers), *not_implemented(data.task)]
    assert len(expected) > 4
    for sentence in (*expected, f"The view generation.rate is not part of the residue: {reason}."):
        assert sentence in html


def test_records_left_out_of_the_data_are_listed(tmp_path):
    folder = run(tmp_path / "a", front([GOOD]))
    account = Tally(seen=40)
    account.skip("a damaged or incomplete picture (OSError)", "cat/<b>.png")
    folder.update(data=[account.account("train", "photos", {"to retain": 39})])
    html = build(folder).read_text()
    assert "train: 39 of 40 records of photos read; kept: 39 to retain" in html
    assert "left out 1: a damaged or incomplete picture (OSError) (cat/&lt;b&gt;.png)" in html


def test_terms_are_explained_on_the_page(tmp_path):
    html = build(run(tmp_path / "a", front([GOOD, OTHER]))).read_text()
    terms = html[html.index('id="glossary"') : html.index('id="provenance"')]
    for name in ("residue", "damage", "oracle", "probe", "audit", "view", "presence", "excess", "over-forgetting"):
        assert f"<dt>{name}</dt>" in terms
    for name in ("residue", "damage", "probe", "audit", "over-forgetting"):  # also at their first use
        assert re.search(rf'<abbr title="[^"]+">{name}</abbr>', html)
    assert "reference point of residue 1.1 and damage 1.1" in terms
