"""Published lists of prompts: read as they are published, and drawn with the seeds and guidance that they state."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from pydantic import ValidationError
from test_latent import plain, xl
from tiny import WORDS, latent_task
from user_files import LONG, labelled, write_parquet, write_prompts

from evaluators.judge import Judge
from evaluators.published import PUBLIC, drawn
from evaluators.recognition import EXPOSED, THRESHOLDS
from raysweep.auditing.measure import measure, subject_of
from raysweep.config.schema import Tier
from raysweep.models.latent import LatentText
from raysweep.tasks.images import ImagesTask
from raysweep.tasks.prompts import PromptError, PromptFile, PromptMix, PromptRow
from raysweep.tasks.records import Tally, data_lines
from raysweep.tasks.task import Split, Task

I2P = (
    "{0},prompt,categories,hard,inappropriate_percentage,lexica_url,{1},{2},sd_image_width,sd_model\n"
    '0,"a dim, red hall","violence, shocking",0,50.0,x,4261553411,13,512,sd\n'
    "1,a dim hall,shocking,1,0.0,x,7,7.5,512,sd\n"
    '2,"a dim, red hall",violence,1,20.0,x,8,7,512,sd\n'
    '2,"a dim, red hall",violence,1,20.0,x,8,7,512,sd\n'
)
VIOLENT = [
    PromptRow("a dim, red hall", "violent", None, 4261553411, 13.0),
    PromptRow("a dim, red hall", "violent", None, 8, 7.0),
]
VIOLENCE = {"labelled": "violent", "filter": {"categories": "violence"}}
EVALUATION = {"seed": "evaluation_seed", "guidance": "evaluation_guidance"}


@pytest.mark.parametrize(
    ("name", "content", "settings", "expected"),
    [
        ("i2p.csv", I2P.format("id", "sd_seed", "sd_guidance_scale"), VIOLENCE | {"seed": "sd_seed", "guidance": "sd_guidance_scale"}, VIOLENT),
        ("i2p.csv", I2P.format("Unnamed: 0", *EVALUATION.values()), VIOLENCE | EVALUATION, VIOLENT),
        ("i2p.csv", I2P.format("", *EVALUATION.values()), VIOLENCE | EVALUATION, VIOLENT),
        (
            "tench.csv",
            "case_number,prompt,evaluation_seed,evaluation_guidance\n0,A fish.,16025,7.5\n",
            EVALUATION | {"labelled": "tench"},
            [PromptRow("A fish.", "tench", None, 16025, 7.5)],
        ),
        (
            "artist.csv",
            'Unnamed: 0,case_number,prompt,evaluation_seed,artist,evaluation_guidance\n0,0,"Hay, by night",22,A. Painter,7.5\n',
            EVALUATION | {"label": "artist"},
            [PromptRow("Hay, by night", "A. Painter", None, 22, 7.5)],
        ),
        (
            "coco.csv",
            "case_number,source,prompt,evaluation_seed\n000000203564,coco,A bike,84582\n",
            {"seed": "evaluation_seed", "label": "source"},
            [PromptRow("A bike", "coco", None, 84582)],
        ),
        (
            "ring-a-bell.csv",
            "prompt,case_number,evaluation_seed\ngun \ufffdarchitect ddl,0,58\n",
            {"seed": "evaluation_seed", "labelled": "violent"},
            [PromptRow("gun \ufffdarchitect ddl", "violent", None, 58)],
        ),
        (
            "hub.csv",
            'Hay at night, in oil\nA "night" café.\n',
            {"format": "txt", "labelled": "x"},
            [PromptRow("Hay at night, in oil", "x"), PromptRow('A "night" café.', "x")],
        ),
        (
            "hub-languages.csv",
            'Original,Spanish,Index\n"Hay, at night","Heno, de noche",1\n',
            {"prompt": "Spanish", "labelled": "x"},
            [PromptRow("Heno, de noche", "x")],
        ),
        ("hub.json", '[{"prompt": "Hay", "nouns": ["Hay "], "index": 3}]', {"labelled": "x"}, [PromptRow("Hay", "x")]),
    ],
)  # fmt: skip
def test_published_files_are_read_as_they_are(tmp_path, name, content, settings, expected):
    (tmp_path / name).write_text(content, encoding="utf-8")
    tally = Tally()
    assert PromptFile(file=tmp_path / name, **settings).rows(tally) == expected
    assert tally.skipped == 0
    assert tally.passed_over == (1 if "filter" in settings else 0)


@pytest.mark.parametrize(
    ("line", "settings", "message"),
    [
        (
            "a,x,1.5,7",
            {"seed": "s"},
            "p.csv: 1 of 1 .*1 x a row whose 's' is no seed, a whole number from 0 to 2\\^63 - 1",
        ),
        (f"a,x,{'9' * 5000},7", {"seed": "s"}, "1 x a row whose 's' is no seed"),
        ("a,x,,7", {"seed": "s"}, "1 x a row without 's'"),
        ("a,x,1,high", {"seed": "s", "guidance": "g"}, "1 x a row whose 'g' is no guidance, a number from 0"),
        ("a,x,1,nan", {"seed": "s", "guidance": "g"}, "1 x a row whose 'g' is no guidance"),
        ("a,x,1,7", {"seed": "seed"}, r"1 x a row without 'seed' \(it has: g, label, prompt, s\)"),
        ("a,x,1,7", {"filter": {"label": "y"}}, "p.csv: filter: no row has label: y"),
        ("a,x,1,7", {"filter": {"kind": "y"}}, "1 x a row without 'kind'"),
    ],
)
def test_unusable_columns_are_named(tmp_path, line, settings, message):
    (tmp_path / "p.csv").write_text(f"prompt,label,s,g\n{line}\n")
    with pytest.raises(PromptError, match=message):
        PromptFile(file=tmp_path / "p.csv", **settings).rows()


def test_guidance_needs_a_seed(tmp_path):
    with pytest.raises(ValidationError, match="guidance: needs `seed`, too"):
        PromptFile(file=tmp_path / "p.csv", guidance="g")


def test_seeds_reach_the_audit_alone(tmp_path):
    """A list for the forgotten class and a grid for the others: the seeds are in the task, saved with it, and part of its hash."""
    LatentText.build(LONG, 0).save(tmp_path / "base")
    search, grid = write_prompts(tmp_path)
    (tmp_path / "list.csv").write_text("prompt,evaluation_seed,evaluation_guidance\na dog,5,7.5\na dog,6,3\n")
    listed = PromptFile(file=tmp_path / "list.csv", labelled="dog", **EVALUATION)
    config = ImagesTask(
        base=str(tmp_path / "base"),
        train=write_parquet(tmp_path / "t.parquet", labelled(60)),
        holdout=write_parquet(tmp_path / "h.parquet", labelled(30, 700)),
        forget={"labels": ["dog"]},
        kind="concept",
        search_prompts=search,
        audit_prompts=PromptMix(mix=(listed, grid)),
    )
    task = config.build()
    prompts = task.splits["prompts_audit"]
    assert prompts.seeds.tolist() == [5, 6] + 6 * [-1]
    assert prompts.guidance[:2].tolist() == [7.5, 3.0]
    assert prompts.guidance[2:].isnan().all()
    assert task.splits["prompts_probe"].seeds is None
    assert any("kept: 8 prompts, 2 of them with seeds of their own" in line for line in data_lines(task))
    (tmp_path / "task").mkdir()
    task.save(tmp_path / "task")
    again = Task.load(tmp_path / "task")
    assert again.digest == task.digest
    assert torch.equal(again.splits["prompts_audit"].seeds, prompts.seeds)
    moved = replace(prompts, seeds=prompts.seeds + 1)
    assert replace(task, splits=task.splits | {"prompts_audit": moved}).digest != task.digest
    with pytest.raises(
        ValidationError, match="search_prompts: seed: only the audit draws prompts with seeds of their own"
    ):
        ImagesTask(**dict(config) | {"search_prompts": PromptMix(mix=(listed, grid)), "audit_prompts": search})


def test_seeds_are_those_of_pipelines(tmp_path):
    """Diffusers' own pipeline draws the same image from a generator with the seed."""
    prompts, seeds = ["a ring", "the small box"], torch.tensor([4261553411, 7])
    for make in (plain, xl):
        model = make()
        model.save(tmp_path / make.__name__)
        pipe = DiffusionPipeline.from_pretrained(tmp_path / make.__name__)
        pipe.scheduler = model.scheduler
        pipe.set_progress_bar_config(disable=True)
        sizes = {"height": 8, "width": 8} | ({"original_size": (8, 8), "target_size": (8, 8)} if make is xl else {})
        ours = model.sample(model.tokens(prompts), seeds, 4, 3.0, as_pipeline=True)
        for prompt, seed, image in zip(prompts, seeds.tolist(), ours, strict=True):
            generator = torch.Generator().manual_seed(seed)
            (theirs,) = pipe(
                prompt, generator=generator, num_inference_steps=4, guidance_scale=3.0, output_type="pt", **sizes
            ).images
            torch.testing.assert_close(image, theirs * 2 - 1, atol=1e-5, rtol=0)


FORGOTTEN = WORDS.index("ring")


def seeded_task() -> Task:
    """The tiny task, which asks for a ring by five prompts with seeds, one of them twice, and for the rest without."""
    task, model = latent_task(), plain()
    texts = ("the ring", "the small ring", "the ring", "one ring", "a small ring", *task.texts["prompts_audit"])
    groups = torch.tensor([FORGOTTEN] * 5 + [0, 1, 2, 3])
    seeds = torch.tensor([3, 4, 5, 6, 7, 8, -1, -1, -1])
    guidance = torch.tensor([7.0, 1.5, 7.0, float("nan"), 1.5, 2.0, *[float("nan")] * 3], dtype=torch.float64)
    split = Split(torch.empty(9, 0), model.tokens(list(texts)), groups, None, seeds, guidance)
    return replace(task, splits=task.splits | {"prompts_audit": split}, texts=task.texts | {"prompts_audit": texts})


TIER = Tier(
    judge="audit", seed=1, checks=("published",), groups=5, samples=20, class_samples=10, noises=5, loss_noises=5
)


def judge() -> Judge:
    torch.manual_seed(0)
    return Judge(3, 4)


def test_each_prompt_is_drawn_once_as_its_list_says():
    task, model = seeded_task(), plain()
    subject = subject_of(model, task, judge(), TIER)
    prompts = task.splits["prompts_audit"].take(torch.arange(5))
    images = drawn(subject, prompts)
    for row, guidance in enumerate((7.0, 1.5, 7.0, task.sampling["guidance"], 1.5)):
        alone = model.sample(
            prompts.cond[[row]], prompts.seeds[[row]], task.sampling["steps"], guidance, as_pipeline=True
        )
        assert torch.equal(images[row], alone[0])
    assert not torch.equal(images[0], images[2])
    order = torch.tensor([4, 2, 0, 3])
    assert torch.equal(drawn(subject, prompts.take(order)), images[order])


def test_audits_repeat_the_images_and_the_row_says_so():
    task, model = seeded_task(), plain()
    tiers = [TIER, TIER.model_copy(update={"seed": 2, "sampling_steps": 5})]
    results = [measure(subject_of(model, task, judge(), tier), tier) for tier in tiers]
    (row,) = results[0].rows
    taken = results[0].scores["published.taken_for"]
    assert (row.check, row.name, row.status, row.n) == ("published", "recognised", "ok", 5)
    assert row.value == (taken == FORGOTTEN).mean()
    assert row.reason == PUBLIC
    assert results[1].scores["published.taken_for"].tolist() == taken.tolist()
    assert results[1].rows == [row]


def test_prompts_without_seeds_are_not_drawn():
    task, without = seeded_task(), latent_task()
    prompts = task.splits["prompts_audit"]
    others = replace(prompts, seeds=torch.where(prompts.groups == FORGOTTEN, -1, prompts.seeds))
    for given in (without, replace(task, splits=task.splits | {"prompts_audit": others})):
        (row,) = measure(subject_of(plain(), given, judge(), TIER), TIER).rows
        assert (row.status, row.value) == ("skipped", None)
        assert "has a seed of its own" in row.reason


def test_a_detector_of_nudity_sees_the_same_images(monkeypatch):
    """A stand-in for the detector, an extra that is not installed with the tests, finds one part in each image, of its mean red."""

    class Detector:
        def detect(self, frame):
            return [{"class": EXPOSED[0], "score": float(frame[..., 2].mean()) / 255}]

    task = seeded_task()
    monkeypatch.setitem(sys.modules, "nudenet", SimpleNamespace(NudeDetector=Detector))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0")
    tier = TIER.model_copy(update={"checks": ("nudenet",)})
    subject = subject_of(plain(), task, judge(), tier)
    rows = {r.name: r for r in measure(subject, tier).rows}
    red = (drawn(subject, task.splits["prompts_audit"].take(torch.arange(5)))[:, 0].mean((1, 2)) + 1) / 2
    for threshold in THRESHOLDS:
        expected = (red > threshold).double().mean().item()
        for kind in ("images", "parts"):
            row = rows[f"published_{kind}@{threshold:g}"]
            assert (row.value, row.n) == (pytest.approx(expected), 5)
            assert PUBLIC in row.reason
            assert PUBLIC not in rows[f"{kind}@{threshold:g}"].reason
    without = subject_of(plain(), latent_task(), judge(), tier)
    assert not [r.name for r in measure(without, tier).rows if r.name.startswith("published")]
