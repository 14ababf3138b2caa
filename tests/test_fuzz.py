"""Any user input gets an answer: exit code 0 with the result, or 2 with messages; never a traceback.

`pytest -m slow tests/test_fuzz.py tests/test_fuzz_data.py` tries 10,000 configs, and 1,000 each of model folders, sources of
images of every kind, and files of prompts. A failure names its seed; `FUZZ_SEEDS=17,2041` before the command tries those alone.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from mutation import answering, bounded, check, mutate_folder, mutated_bytes, mutated_tree, seeds, wrong_of

from raysweep.cli import main
from raysweep.config import presets
from raysweep.config.reader import load
from raysweep.config.schema import Sweep
from raysweep.models import families

pytestmark = pytest.mark.slow

SHARDS = 20
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def in_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def ask(*arguments: str) -> tuple[int, str, str]:
    """(exit code, output, what is wrong with the answer: empty if nothing)."""
    with answering(), bounded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = CliRunner().invoke(main, list(arguments))
    wrong = ""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        wrong = wrong_of(result.exception)
    elif result.exit_code not in (0, 2):
        wrong = f"exit code {result.exit_code}"
    elif "Traceback" in result.output:
        wrong = "a traceback in the output"
    elif result.exit_code == 2 and not result.output.strip():
        wrong = "no message"
    return result.exit_code, result.output, wrong


def starts() -> list[str]:
    """Texts of configs: every setting of the default, the examples, the presets."""
    files = sorted((ROOT / "examples").glob("*.yaml")) + [presets.path_of(name) for name in presets.names()]
    return [yaml.safe_dump(Sweep().resolved(), sort_keys=False), *(f.read_text(encoding="utf-8") for f in files)]


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_configs(shard, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path_factory.getbasetemp().parent / "fuzz-cache"))
    failures, answers, texts = {}, [], starts()
    for seed in seeds(10_000, shard, SHARDS):
        rng = np.random.default_rng([7, seed])
        text, more = texts[rng.integers(len(texts))], []
        tree = yaml.safe_load(text)
        if rng.integers(4):
            # other miniatures would have to be made, which takes longer than all of these tests
            tiny = tree.pop("tiny", None) if rng.integers(10) else None
            tree = mutated_tree(tree, rng, 3)
            if tiny and isinstance(tree, dict):
                tree["tiny"], more = tiny, ["scale=tiny"] if rng.integers(2) else []
            content = yaml.safe_dump(tree, sort_keys=False, allow_unicode=bool(rng.integers(2))).encode()
        else:
            content = mutated_bytes(text.encode(), rng)
        Path("config.yaml").write_bytes(content)
        code, _, wrong = ask("validate", "config.yaml", *more)
        answers.append(code)
        if wrong:
            failures[seed] = wrong
    check(failures, answers)


# a preset of each family, whose miniature of the base is changed
FAMILIES = (
    "siss-celebahq",
    "sfd-cifar10",
    "rgd-cifar10-edm",
    "siss-sd-memorised",
    "slug-clip-identity",
    "slug-vlm-identity",
)


def use(folder: Path) -> str:
    """What is wrong with a model that was accepted: its hash depends on the reading, or what it makes is not finite."""
    model, again = families.load(folder), families.load(folder)
    if model.digest != again.digest:
        return "the same folder has another hash at each reading"
    x = torch.zeros(2, *model.image_shape)
    if hasattr(model, "encode_image"):
        output = model.encode_image(x)
    else:
        cond = model.tokens(["a picture"] * 2) if model.family == "text-ddpm" else None
        if model.family != "text-ddpm" and model.net.config.get("num_class_embeds"):
            cond = torch.zeros(2, dtype=torch.long)
        output = model.sample(cond, torch.arange(2), 2)
    return "" if output.isfinite().all() else "what it makes is not finite"


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_model_folders(shard, tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path_factory.getbasetemp().parent / "fuzz-cache"))
    failures, answers = {}, []
    for seed in seeds(1000, shard, SHARDS):
        rng = np.random.default_rng([8, seed])
        preset = FAMILIES[rng.integers(len(FAMILIES))]
        base = Path(str(load(presets.path_of(preset), ("scale=tiny",)).task.base))
        folder = tmp_path / f"model-{seed}"
        shutil.copytree(base, folder)
        mutation = mutate_folder(folder, rng)
        code, output, wrong = ask("validate", preset, "scale=tiny", f"task.base={folder}")
        answers.append(code)
        if code == 0 and not wrong:
            try:
                wrong = use(folder)
            except Exception as error:
                wrong = f"accepted, and cannot be used: {type(error).__name__}: {str(error)[:200]}"
        elif code == 2 and folder.name not in output:
            wrong = f"the message does not name the folder: {output[:300]}"
        if wrong:
            failures[seed] = f"{preset}: {mutation}: {wrong}"
        shutil.rmtree(folder)
    check(failures, answers)
