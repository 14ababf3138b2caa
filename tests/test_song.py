"""Published EDM snapshots: the network against the papers' description, and a reader that runs no code."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pickle

import method_table
import published
import pytest
import torch
from click.testing import CliRunner
from published import DDPMPP, NCSNPP, DhariwalUNet, VPPrecond, network, pickled, snapshot
from tiny import tiny_config, tiny_task
from torch.nn import functional as F

from raysweep.cli import main
from raysweep.export import modelcard
from raysweep.models import families
from raysweep.models.edm import EDM
from raysweep.models.folders import located
from raysweep.models.snapshot import read
from raysweep.models.song import SongUNet
from raysweep.registry import names, resolve, unserved
from raysweep.rundir import RunDir
from raysweep.storage.files import digest_state

SONG = {
    "sample_size": 4,
    "in_channels": 1,
    "out_channels": 1,
    "num_class_embeds": 6,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (2,),
}


def write(path, content) -> str:
    path.write_bytes(content if isinstance(content, bytes) else pickled(content))
    return str(path)


def call(*arguments: str):
    return CliRunner().invoke(main, list(arguments))


@pytest.mark.parametrize("style", [DDPMPP, NCSNPP], ids=["ddpm++", "ncsn++"])
@pytest.mark.parametrize("more", [{}, {"label_dim": 0, "augment_dim": 0}, {"channel_mult": [2, 1, 2]}], ids=str)
def test_a_snapshot_computes_the_network_of_the_papers(tmp_path, style, more):
    """In single precision, for noise levels from the smallest to the largest, with classes and without one."""
    net = network(style, **more)
    write(tmp_path / "a.pkl", snapshot(net))
    model = read(tmp_path / "a.pkl")
    x = torch.randn(4, 3, 8, 8)
    t = torch.tensor([0.002, 0.3, 2.0, 80.0]).log() / 4
    labels = torch.tensor([0, 3, 9, 10])
    with torch.no_grad():
        output = model.net(x, t, labels if net.map_label else None).sample
        expected = net(x, t, F.one_hot(labels, 11)[:, :10].float())
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
        if net.map_label:  # the label after the last class means no class
            assert torch.equal(model.net(x, t).sample[3], output[3])
    assert float(expected.std()) > 0.1


def test_settings_of_a_snapshot_are_kept(tmp_path):
    write(tmp_path / "a.pkl", snapshot(network(DDPMPP)))
    model = read(tmp_path / "a.pkl")
    assert (model.training["p_mean"], model.training["p_std"], model.edm["sigma_data"]) == (-1.1, 1.3, 0.5)
    assert model.null_label is None  # it was never trained without a class
    write(tmp_path / "b.pkl", snapshot(network(DDPMPP, label_dropout=0.1)))
    assert read(tmp_path / "b.pkl").null_label == 10


def test_a_converted_snapshot_is_a_model(tmp_path):
    path = write(tmp_path / "a.pkl", snapshot(network(NCSNPP)))
    result = call("convert", path, str(tmp_path / "model"))
    assert result.exit_code == 0, result.output
    assert "8 pixels, 10 classes" in result.output
    model, first = families.load(tmp_path / "model"), read(tmp_path / "a.pkl")
    assert (model.digest, model.training, model.edm) == (first.digest, first.training, first.edm)
    assert not [p for p in (tmp_path / "model").rglob("*") if p.suffix in (".pkl", ".bin", ".pt")]
    assert json.loads((tmp_path / "model" / "unet" / "config.json").read_text())["_class_name"] == "SongUNet"
    net = SongUNet.from_pretrained(tmp_path / "model" / "unet")
    seeds, cond = torch.arange(3), torch.tensor([1, 2, 3])
    assert torch.equal(EDM(net, model.edm, model.training).sample(cond, seeds, 4), first.sample(cond, seeds, 4))
    again = call("convert", path, str(tmp_path / "model"))
    assert again.exit_code == 2
    assert "exists already" in again.output


class Evil:
    def __reduce__(self):
        return eval, ("print('this ran')",)


class EvilStorage:
    def __reduce__(self):
        return torch.storage._load_from_bytes, (pickle.dumps(Evil()),)


def changed(change):
    net = network(DDPMPP)
    change(net)
    return snapshot(net)


def _lose(net):
    del net.enc["8x8_block1"]._modules["conv1"]


def _resize(net):
    net.dec["4x4_in0"].affine.bias = torch.nn.Parameter(torch.zeros(7))


def _spoil(net):
    net.map_layer1.weight.data[0, 0] = float("nan")


def _skip(net):
    net.dec["8x8_aux_up"] = published.Conv2d(3, 3, 1, "up")


def _add(net):
    net.map_more = published.Linear(2, 2)


BAD = {
    "evil": (lambda: {"ema": Evil()}, r"refused: it names .*, which could run code"),
    "evil beside": (lambda: snapshot(network(DDPMPP), augment_pipe=Evil()), r"refused: it names .*, which could run code"),
    "evil inside a tensor": (lambda: snapshot(network(DDPMPP), augment_pipe=EvilStorage()), "not a snapshot of EDM"),
    "bytes": (lambda: b"no pickle", "not a snapshot of EDM"),
    "cut": (lambda: pickled(snapshot(network(DDPMPP)))[:20000], "not a snapshot of EDM"),
    "plain": (lambda: pickle.dumps({"a": 1}), "holds no network under ema"),
    "list": (lambda: pickle.dumps([1]), "holds no network under ema"),
    "other network": (lambda: snapshot(DhariwalUNet()), "its network is DhariwalUNet; read are the SongUNets"),
    "other preconditioning": (lambda: {"ema": VPPrecond(network(DDPMPP), 8)}, "under VPPrecond; read is EDMPrecond"),
    "other decoder": (lambda: changed(_skip), "of the type 'skip'; read are DDPM\\+\\+ and NCSN\\+\\+"),
    "other filter": (lambda: snapshot(network(DDPMPP, resample_filter=[1, 2, 2, 1])), r"neither \[1, 1\] nor \[1, 3, 3, 1\]"),
    "missing": (lambda: changed(_lose), "conv1"),
    "shape": (lambda: changed(_resize), r"time_emb_proj.bias is \(7,\), and \(32,\) is needed"),
    "nan": (lambda: changed(_spoil), "time_embedding.linear_2.weight is not finite"),
    "more": (lambda: changed(_add), "its tensor map_more.weight is not of a SongUNet"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_other_files_are_refused_in_one_sentence(tmp_path, name, capfd):
    make, message = BAD[name]
    path = write(tmp_path / "bad.pkl", make())
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / "bad.pkl")
    assert str(error.value).startswith(str(tmp_path / "bad.pkl"))
    result = call("convert", path, str(tmp_path / "model"))
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert not (tmp_path / "model").exists()
    assert "ran" not in capfd.readouterr().out


def test_a_pickle_instead_of_a_folder_is_refused_with_the_command_that_converts_it(tmp_path):
    path = write(tmp_path / "a.pkl", snapshot(network(DDPMPP)))
    for open_ in (located, families.load):
        with pytest.raises(ValueError, match=f"raysweep convert {path} OUT_DIR"):
            open_(path)
    assert call("convert", str(tmp_path / "no.pkl"), str(tmp_path / "m")).output.endswith("no.pkl: no such file\n")


@pytest.mark.parametrize("config", [{"song_unet": SONG}, {"unet": tiny_config(6)["unet"]}], ids=["song", "unet"])
def test_the_line_of_the_model_card_reads_the_candidate(tmp_path, config):
    run = RunDir(tmp_path / "run")
    model, task = EDM.build(config, 0), dataclasses.replace(tiny_task("class"), family="edm")
    run.task.mkdir(parents=True)
    task.save(run.task)
    model.save(run.candidates / "000-rgd")
    card = {
        "trial": "000-rgd",
        "method": "rgd",
        "base_digest": "b",
        "task_digest": "t",
        "outcome": {"digest": "o"},
        "hyperparameters": {},
        "seed": 1,
    }
    text = modelcard.page(run, card, run.candidates / "000-rgd")
    line = next(part.strip() for part in text.splitlines() if "from_pretrained(FOLDER" in part)
    module, _, call_ = line.partition(".from_pretrained")
    package, _, name = module.rpartition(".")
    network = getattr(importlib.import_module(package), name)
    net = eval(f"network.from_pretrained{call_}", {"network": network, "FOLDER": run.candidates / "000-rgd"})
    assert digest_state(net.state_dict()) == digest_state(model.net.state_dict())


@pytest.mark.parametrize("name", sorted(n for n in names("method") if not unserved(resolve("method", n), "edm")))
def test_every_method_of_the_family_takes_a_step_on_it(name):
    model = EDM.build({"song_unet": SONG, "null_label": 6}, 0)
    model.net.to(torch.float64)
    method, task = method_table.build(name, tiny_task("class"), model=model)
    before = method_table.weights(method).clone()
    after = method_table.run(method, task, 0, 1)
    method.finish()
    assert bool(torch.isfinite(after).all())
    assert torch.equal(before, after) == (name not in method_table.TRAINED)
