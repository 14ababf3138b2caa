"""Checks with networks from users: real formats, controls, caches by content, and files that cannot be used."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
import sys

import numpy as np
import pytest
import torch
from outside import classifier_folder, clip_folder, detector_folder, dino_folder, inception_file, sscd_file
from test_evaluators import subject
from tiny import tiny_model

from evaluators.base import Inapplicable
from evaluators.external import (
    CLIP,
    DINO,
    SSCD,
    ImageClassifier,
    Inception,
    ObjectDetector,
    Unreadable,
    check,
    network,
    rgb,
)
from evaluators.fidelity import CLIPFidelity, DINOFidelity, InceptionFidelity
from evaluators.judge import Judge
from evaluators.memorisation import CopyDetection
from evaluators.recognition import CLIPIQA, Alignment, Detection, NudeNet, OutsideClassifier, ZeroShot
from evaluators.statistics import frechet
from raysweep.auditing.measure import measure, reduce, subject_of
from raysweep.config.reader import validate
from raysweep.config.schema import ConfigError, Tier
from raysweep.registry import checks_by_weights

NAMES = ("circle", "square", "star", "line", "dot", "cross")


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    return Judge(1, 6).eval()


@pytest.fixture(scope="module")
def named(class_task):
    return dataclasses.replace(class_task, class_names=NAMES)


@pytest.fixture(scope="module")
def brought(named, tmp_path_factory):
    folder = tmp_path_factory.mktemp("brought")
    split = named.splits["judge_probe"]
    return {
        "clip": clip_folder(folder / "clip"),
        "dino": dino_folder(folder / "dino"),
        "classifier": classifier_folder(folder / "classifier", NAMES, split.x, split.groups),
        "detector": detector_folder(folder / "detector", split.x),
        "sscd": sscd_file(folder / "sscd.pt"),
        "inception": inception_file(folder / "inception.pth"),
    }


class Real:
    """Acts as a model whose samples are real held-out images of the requested class."""

    def __init__(self, task):
        self.task, self.model = task, tiny_model(task)

    def __getattr__(self, name):
        return getattr(self.model, name)

    def sample(self, cond, seeds, steps, guidance=1.0, **_):
        pool = [self.task.splits[n] for n in ("holdout", "forget_holdout")]
        x, groups = torch.cat([p.x for p in pool]), torch.cat([p.groups for p in pool])
        every = torch.arange(len(x))
        picks = [every[groups == int(c)] if int(c) in groups else every for c in cond]  # the null label: any image
        return torch.stack([x[p[i % len(p)]] for i, p in enumerate(picks)])


def test_a_configured_file_adds_its_checks(named, brought, judge):
    weights = {k: v for k, v in brought.items() if k != "inception"}
    tier = Tier(seed=1, judge="probe", checks=("per_class",), samples=40, class_samples=20, groups=5, weights=weights)
    assert set(tier.checks_for(named)) == {"per_class", *checks_by_weights()} - {"fidelity_inception"}
    result = measure(subject_of(tiny_model(named), named, judge, tier), tier)
    assert {r.status for r in result.rows} == {"ok"}, [r for r in result.rows if r.status != "ok"]
    assert {r.check for r in result.rows} == set(tier.checks_for(named))


def test_the_digest_of_a_tier_depends_on_the_content_of_its_weights(brought, tmp_path):
    copy = sscd_file(tmp_path / "copy.pt")

    def digest(path):
        return Tier(seed=1, judge="probe", weights={"sscd": path}).digest

    moved = tmp_path / "moved.pt"
    moved.write_bytes(copy.read_bytes())
    assert digest(copy) == digest(moved) != Tier(seed=1, judge="probe").digest
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(moved))
    assert digest(copy) != digest(moved)


@pytest.mark.parametrize(
    ("tier", "message"),
    [
        ({"weights": {"sscd": "nowhere.pt"}}, "nowhere.pt does not exist"),
        ({"checks": ["zero_shot", "fidelity", "classifier"]}, "'zero_shot' needs weights.clip"),
        ({"weights": {"resnet": "x"}}, "'sscd', 'clip'"),
    ],
)
def test_invalid_weights_in_a_config(tier, message):
    with pytest.raises(ConfigError, match=message):
        validate({"audit": {"audit": tier}}, "sweep.yaml")


def test_an_outside_classifier_with_another_order_of_labels(named, brought, judge):
    one = subject(named, judge, model=Real(named), weights=brought)
    scores = OutsideClassifier().scores(one)
    metrics = {m.name: m for m in reduce(OutsideClassifier(), scores, one, 5).metrics}
    assert metrics["real_accuracy"].value > 0.9
    assert metrics["recognised"].value > 0.8
    assert metrics["retain_accuracy"].value > 0.8
    assert metrics["recognised"].reason == ""
    blind = dict(scores, real_right=np.zeros(40))
    assert "not to be trusted" in reduce(OutsideClassifier(), blind, one, 5).metrics[0].reason


def test_a_label_that_the_classifier_does_not_know(named, brought, judge):
    def with_names(*names):
        return subject(dataclasses.replace(named, class_names=names), judge, weights=brought)

    forgotten = named.forget_class
    other = [*NAMES]
    other[forgotten] = "cat"
    for evaluator in (OutsideClassifier(), Detection()):
        with pytest.raises(Unreadable, match="no label 'cat'; its labels: cross, dot"):
            evaluator.scores(with_names(*other))
    only = ["cat"] * len(NAMES)
    only[forgotten] = NAMES[forgotten]
    with pytest.raises(Inapplicable, match=f"knows '{NAMES[forgotten]}', but not 'cat'"):
        OutsideClassifier().scores(with_names(*only))
    assert "forgotten" in Detection().scores(with_names(*only))


class HalfBlank(Real):
    """Every second sample shows nothing."""

    def sample(self, cond, seeds, steps, guidance=1.0, **_):
        x = super().sample(cond, seeds, steps)
        x[1::2] = -0.5
        return x


def test_detections_and_their_identity(named, brought, judge):
    one = subject(named, judge, model=HalfBlank(named), weights=brought)
    scores = Detection().scores(one)
    assert scores["found"].tolist() == [1, 0] * (len(scores["found"]) // 2)
    assert not scores["forgotten"][1::2].any()
    metrics = {m.name: m for m in reduce(Detection(), scores, one, 5).metrics}
    assert metrics["absent"].value == 0.5
    assert metrics["absent"].lo < 0.5 < metrics["absent"].hi
    assert metrics["control"].value > 0.9
    assert metrics["identity"].n == len(scores["found"]) // 2
    assert metrics["identity"].value == pytest.approx(scores["forgotten"][::2].mean())
    assert {m.reason for m in metrics.values()} == {""}


def test_a_sample_counts_with_its_most_probable_box(named, brought, judge):
    one = subject(named, judge, model=Real(named), weights=brought)
    aimed = one.generate(one.forgotten(3), torch.arange(3))
    height, width = aimed.shape[2:]
    whole, corner = (0, 0, width, height), (0, 0, 2, 2)
    alone = [Detection.identity(one, aimed[:1], [[box]])[0] for box in (whole, corner)]
    both = Detection.identity(one, aimed, [[whole, corner], [], [corner, whole]])
    assert both[0] == pytest.approx(max(alone))
    assert both[1] == 0
    assert alone[0] != pytest.approx(alone[1])


@pytest.mark.parametrize("shown", [0, 1])
def test_with_fewer_than_two_detections_there_is_no_interval(named, brought, judge, shown):
    one = subject(named, judge, weights=brought)
    detected = np.arange(20) < shown
    scores = {"found": detected.astype(float), "forgotten": 0.7 * detected, "control": np.zeros(10)}
    metrics = {m.name: m for m in reduce(Detection(), scores, one, 5).metrics}
    assert metrics["identity"].value == pytest.approx(0.7 * shown)
    assert metrics["identity"].lo is None
    assert f"no interval: something is found in {shown} of 20" in metrics["identity"].reason
    assert all(
        m.reason.startswith("not to be trusted: it finds nothing in 100% of real images") for m in metrics.values()
    )


def test_without_a_classifier_there_is_no_identity(named, brought, judge):
    one = subject(named, judge, weights={"detector": brought["detector"]})
    assert set(Detection().values(Detection().scores(one), one)) == {"absent", "control"}


def test_clip_iqa_is_the_probability_of_the_good_prompt(named, brought, judge):
    one = subject(named, judge, weights=brought)
    clip = network(one, "clip", CLIP)
    images, texts = (torch.from_numpy(e) for e in (clip(one.samples()[0]), clip.texts(["Good photo.", "Bad photo."])))
    wanted = (100 * images @ texts.T).softmax(1)[:, 0]
    scores = CLIPIQA().scores(one)
    np.testing.assert_allclose(scores["quality"], wanted.numpy(), rtol=1e-9)
    (row,) = reduce(CLIPIQA(), scores, one, 5).metrics
    assert row.value == pytest.approx(float(wanted.mean()))
    assert 0 < row.lo < row.value < row.hi < 1


def test_clip_agrees_with_open_clip(named, brought, judge):
    import open_clip
    from PIL import Image

    one = subject(named, judge, weights=brought)
    clip = network(one, "clip", CLIP)
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{brought['clip']}")
    x = torch.rand(2, 3, 40, 40) * 2 - 1
    frames = [(rgb(image[None])[0] * 255).round().byte().permute(1, 2, 0).numpy() for image in x]
    with torch.no_grad():
        wanted = model.eval().encode_image(
            torch.stack([preprocess(Image.fromarray(f)) for f in frames]), normalize=True
        )
    np.testing.assert_allclose(clip(x), wanted.numpy(), atol=0.02)
    np.testing.assert_allclose(np.linalg.norm(clip.texts(["a", "b"]), axis=1), 1, rtol=1e-6)
    ZeroShot().scores(one)
    alignment = Alignment().scores(one)
    assert np.abs(alignment["retain"]).max() <= 1 + 1e-9
    assert network(one, "clip", CLIP) is clip  # kept in memory


def test_copies_are_detected_and_chance_resemblance_is_not(points_task, brought, judge):
    clean, copying = (subject(points_task, judge, weights=brought) for _ in range(2))
    forget = points_task.splits["forget"].distinct().x
    holdout = points_task.splits["holdout"].x
    clean.once("samples", lambda: (holdout[torch.arange(40) % len(holdout)], None))
    copying.once("samples", lambda: (torch.cat([forget[:1].expand(10, -1, -1, -1), holdout[:30]]), None))
    values = CopyDetection().values(CopyDetection().scores(copying), copying)
    assert values["copies"] == pytest.approx(10 / 40)
    assert CopyDetection().values(CopyDetection().scores(clean), clean)["copies"] <= 1 / 40
    sscd = network(clean, "sscd", SSCD)
    np.testing.assert_allclose((sscd(forget) ** 2).sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("evaluator", [CLIPFidelity, DINOFidelity])
def test_fidelity_in_feature_spaces_of_user_networks(named, brought, judge, evaluator):
    real = named.splits["retain"].x
    one = subject(named, judge, weights=brought)
    one.once("samples", lambda: (real, None))
    values = evaluator().values(evaluator().scores(one), one)
    assert values["frechet"] == pytest.approx(0, abs=1e-4)
    assert values["diversity"] == pytest.approx(1)
    noise = subject(named, judge, weights=brought)
    noise.once("samples", lambda: (torch.rand_like(real) * 2 - 1, None))
    assert evaluator().values(evaluator().scores(noise), noise)["frechet"] > values["frechet"] + 1e-3


def test_inception_agrees_with_torch_fidelity(named, brought, judge):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    one = subject(named, judge, weights=brought, samples=40)
    net = network(one, "inception", Inception)
    x = named.splits["retain"].x[:2]
    plain = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(brought["inception"])
    )
    with torch.no_grad():
        (wanted,) = plain.eval()((rgb(x) * 255).round().byte())
    outputs = net(x)
    assert outputs.shape == (2, 2048 + 1008)
    np.testing.assert_allclose(outputs[:, :2048], wanted.numpy(), rtol=1e-4, atol=1e-5)
    one.once("fidelity_inception.samples", lambda: InceptionFidelity().outputs(one, named.splits["retain"].x[:20]))
    scores = InceptionFidelity().scores(one)
    assert scores["features"].shape == (20, 2048)
    assert scores["logits"].shape == (20, 1008)


def test_both_references_of_a_forgotten_class(class_task, judge):
    """With and without the class itself, as published by different papers."""
    draw = np.random.default_rng(0)
    splits = {"retain": draw.normal(0, 1, (60, 4)), "forget": draw.normal(3, 1, (20, 4))}

    class Drawn(InceptionFidelity):
        def split_features(self, subject, split):
            return splits[split]

    features = draw.normal(0, 1, (50, 4))
    values = Drawn().values({"features": features}, subject(class_task, judge, full_fidelity=0))
    assert values["frechet"] == pytest.approx(frechet(features, splits["retain"]))
    assert values["frechet_all"] == pytest.approx(frechet(features, np.concatenate(list(splits.values()))))
    assert values["frechet_all"] > values["frechet"]


KINDS = {"sscd": SSCD, "clip": CLIP, "classifier": ImageClassifier, "detector": ObjectDetector, "inception": Inception}


def test_files_that_cannot_be_used(named, judge, tmp_path):
    bad = tmp_path / "weights"
    bad.write_bytes(b"cut short")
    evil = tmp_path / "evil.pth"

    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit('code ran')",))

    evil.write_bytes(pickle.dumps({"weight": Evil()}))
    for key, kind in KINDS.items():
        with pytest.raises(Unreadable, match="cannot be read as"):
            network(subject(named, judge, weights={key: bad}), key, kind)
    with pytest.raises(Unreadable, match="cannot be read as Inception"):
        network(subject(named, judge, weights={"inception": evil}), "inception", Inception)
    with pytest.raises(Inapplicable, match="is not set"):
        network(subject(named, judge), "clip", CLIP)
    with pytest.raises(Inapplicable, match="does not exist"):
        network(subject(named, judge, weights={"clip": tmp_path / "gone"}), "clip", CLIP)


def test_files_without_some_tensors_are_refused(brought, tmp_path):
    """The library would fill the gaps with random numbers; the message names the missing tensors."""
    from safetensors.torch import load_file, save_file

    for key, file in (
        ("clip", "open_clip_model.safetensors"),
        ("classifier", "model.safetensors"),
        ("dino", "model.safetensors"),
    ):
        folder = shutil.copytree(brought[key], tmp_path / key)
        state = load_file(folder / file)
        name = sorted(n for n in state if n.endswith(".weight") and "layernorm" not in n.lower())[0]
        save_file({n: t for n, t in state.items() if n != name}, folder / file)
        with pytest.raises(Unreadable, match=rf"{key}: cannot be read as .*{name.split('.')[-2]}"):
            check(key, folder)
        save_file({n: t * torch.nan for n, t in state.items()}, folder / file)
        with pytest.raises(Unreadable, match="hold numbers that are not finite"):
            check(key, folder)
        check(key, brought[key])


def test_a_dino_without_a_pooler_gives_its_class_token(tmp_path):
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bare = ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4), add_pooling_layer=False).eval()
    bare.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    x = torch.rand(3, 3, 8, 8) * 2 - 1
    net = DINO(tmp_path, "cpu")
    with torch.no_grad():
        wanted = bare(x).last_hidden_state[:, 0]
    np.testing.assert_allclose(net(x), wanted.numpy(), atol=1e-4)


def test_tasks_without_names_are_skipped(class_task, brought, judge):
    with pytest.raises(Inapplicable, match="no class names"):
        ZeroShot().scores(subject(class_task, judge, weights=brought))


def test_nudenet_needs_its_extra(points_task, judge):
    pytest.importorskip("nudenet", reason="the extra is absent")
    one = subject(points_task, judge, samples=20)
    scores = NudeNet().scores(one)
    values = NudeNet().values(scores, one)
    assert values["images@0.2"] >= values["images@0.8"]
    assert all("not to be trusted" in m.reason for m in NudeNet().rows(scores, one, {}))


def test_without_nudenet_the_row_is_skipped(points_task, judge, monkeypatch):
    monkeypatch.setitem(sys.modules, "nudenet", None)
    tier = Tier(seed=1, judge="probe", checks=("nudenet",), samples=20, groups=5)
    rows = measure(subject_of(tiny_model(points_task), points_task, judge, tier), tier).rows
    assert {r.status for r in rows} == {"skipped"}
    assert all("raysweep[nudenet]" in r.reason for r in rows)
