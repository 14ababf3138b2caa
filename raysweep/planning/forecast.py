"""What a paper's experiment would take on a cluster, from its config alone: plan, GPU-hours, disk, memory, and what is missing.

Arithmetic is counted (`raysweep.planning.footprint`); time is that arithmetic at an assumed share of the vendor's peak of an H100.
Memory is the numbers that a method says it holds, and the activations of its batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from methods.base import Descent
from raysweep.config import presets
from raysweep.config.schema import ConfigError, Sweep
from raysweep.engine.resources import Node, make_plan
from raysweep.models.folders import is_hub_id
from raysweep.planning import footprint
from raysweep.planning.dry_run import typical
from raysweep.planning.footprint import SINGLE, Footprint
from raysweep.registry import attacks, resolve
from raysweep.search.spaces import Space
from raysweep.search.spaces import load as load_space
from raysweep.storage.code_digests import ROOT
from raysweep.tasks.images import ImagesTask
from raysweep.tasks.sources import TORCHVISION

PEAK = {"fp32": 67e12, "bf16": 989e12}  # operations per second of an H100 SXM by its data sheet, without sparsity
SHARE = 0.3  # of the peak that is assumed to be reached
RELEARNING_ROWS = 64  # of a batch of an attack that trains
CLUSTER = "cluster.yaml"


@dataclass(frozen=True)
class Forecast:
    """GPU-hours by part, bytes on disk, and peak bytes on a GPU by method."""

    training: float
    search: float
    audit: float
    disk: float
    memory: dict[str, float]

    @property
    def gpu_hours(self) -> float:
        return self.training + self.search + self.audit


def ours(sweep: Sweep) -> ImagesTask:
    """The task of a preset, which is always on a user's own model and images."""
    assert isinstance(sweep.task, ImagesTask)
    return sweep.task


def missing(sweep: Sweep, about: presets.About) -> list[tuple[presets.Bring, str]]:
    """What a preset needs and is not there: (what, the value of its setting)."""
    data = sweep.resolved()
    found = []
    for bring in about.bring:
        value, parent = _at(data, bring.key)
        values = value if isinstance(value, list) else [value]
        gone = [str(v) for v in values if v is None or not _there(str(v), parent)]
        if gone or not values:
            found.append((bring, ", ".join(gone) or "not set"))
    return found


def cluster_file() -> Path:
    """The launcher file here, else the one of the source tree; raises ConfigError if there is neither."""
    for path in (Path(CLUSTER), ROOT / CLUSTER):
        if path.is_file():
            return path
    raise ConfigError(f"{CLUSTER}: not in this folder, so there is no cluster to plan for")


def nodes_of(cluster: Path) -> list[Node]:
    """The nodes that a launcher file of Ray asks for; raises ConfigError if it is not one."""
    found = []
    try:
        types = yaml.safe_load(cluster.read_text(encoding="utf-8"))
        for name, node in types["available_node_types"].items():
            count = 1 if name == types.get("head_node_type") else node.get("min_workers", 0)
            offered, role = node.get("resources", {}), node.get("labels", {}).get("role", "")
            found += [Node(float(offered.get("CPU", 0)), float(offered.get("GPU", 0)), role)] * count
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{cluster}: not a launcher file with available_node_types ({error})") from error
    return found


def forecast(sweep: Sweep, network: Footprint, spaces: list[Space]) -> Forecast:
    """The cost of a sweep over a network of that size."""
    task = ours(sweep)
    seconds = network.flops / (SHARE * PEAK[sweep.train.precision])
    single = network.flops / (SHARE * PEAK["fp32"])
    recipe = task.recipe
    retrained = (0 if task.trained else 1) + (0 if sweep.oracle_models or not task.base_steps else sweep.oracles)
    training = retrained * task.base_steps * recipe.get("batch_size", 64) * 3 * single
    each = sweep.search.trials // len(spaces)
    search = 0.0
    for space in spaces:
        settings = typical(space)
        rows = (
            settings.get("steps", 1)
            * settings.get("batch_size", 64)
            * resolve("method", space.method).forwards_per_step
        )
        search += each * rows * seconds
    search += (sweep.search.trials + sweep.oracles + 2) * _audit_seconds(sweep, network, "probe")
    audited = min(sweep.audit.top, sweep.search.trials) * sweep.audit.rounds + sweep.oracles + 2
    attacked = sweep.audit.finalists + sweep.oracles + 1
    named = sweep.audit.durability.checks
    attacks_made = len(attacks() if named is None else named)
    audit = audited * _audit_seconds(sweep, network, "audit")
    audit += attacked * _audit_seconds(sweep, network, "durability") * attacks_made
    kept = sweep.search.trials + retrained
    return Forecast(
        training / 3600, search / 3600, audit / 3600, float(kept * network.saved),
        {s.method: _memory(sweep, network, s) for s in spaces},
    )  # fmt: skip


def describe(sweep: Sweep, about: presets.About) -> list[tuple[str, str]]:
    """(topic, text) of everything that a dry run of a preset tells."""
    network = footprint.of(about.network)
    spaces = [load_space(name, sweep.spaces.get(name), ours(sweep).kind) for name in sweep.methods]
    cluster = cluster_file()
    plan = make_plan(nodes_of(cluster), sweep)
    cost = forecast(sweep, network, spaces)
    share = sweep.search.trials // len(sweep.methods)
    lanes = max(1.0, plan.slots * plan.workers * plan.worker_gpus)
    wall = cost.training + cost.search / lanes + cost.audit / max(1.0, plan.auditors + plan.late_auditors)
    absent = missing(sweep, about)
    return [
        ("preset", f"{about.title}; {about.paper}"),
        *(("protocol", line) for line in about.protocol),
        *(("differs", line) for line in about.differs),
        ("search", f"{sweep.search.trials} trials: {share} each of {', '.join(sweep.methods)}; {sweep.search.sampler}"),
        ("cluster", f"{cluster}: {plan.describe()}"),
        ("network", f"{network.parameters / 1e6:.1f} M weights, {network.flops / 1e9:.3g} GFLOP per image and pass"),
        ("cost", f"about {_hours(cost.gpu_hours)} of an H100: base and oracles "
         f"{_hours(cost.training) if cost.training else 'are given'}, search "
         f"{_hours(cost.search)}, audits {_hours(cost.audit)}; about {_hours(wall)} on this cluster"),
        ("assumes", f"{SHARE:.0%} of {PEAK['fp32'] / 1e12:.0f} TFLOP/s in single precision, of {PEAK['bf16'] / 1e12:.0f} in bf16"),
        ("memory", "; ".join(f"{n} {size / 1e9:.1f} GB" for n, size in cost.memory.items()) + " on one GPU"),
        ("disk", f"{cost.disk / 1e9:.0f} GB of candidates and oracles"),
        *(("missing", f"{b.key} ({value}): {b.what}; {b.get}") for b, value in absent),
    ]  # fmt: skip


def _memory(sweep: Sweep, network: Footprint, space: Space) -> float:
    """Peak bytes of a training step on one of the workers, and the base model that it keeps for the next job."""
    method, settings = resolve("method", space.method), typical(space)
    rows = settings.get("batch_size", 64) / sweep.train.workers
    kept = network.saved - SINGLE * network.others.get("vae", 0)  # an autoencoder is shared
    if issubclass(method, Descent) and settings.get("ema", method.Hyperparameters.model_fields["ema"].default) > 0:
        kept += SINGLE * network.trained(sweep.train.modules)  # the moving average
    return network.step(method, rows, sweep.train.modules, sweep.train.precision) + kept


def _audit_seconds(sweep: Sweep, network: Footprint, name: str) -> float:
    """What a tier takes of one model, by the forward passes of one image that it makes, to the leading order."""
    tier, task = getattr(sweep.audit, name), ours(sweep)
    guided = 1 if task.guidance in (0, 1) else 2
    drawn = tier.class_samples if name == "durability" else 2 * tier.samples + tier.class_samples
    trained = sum(tier.relearn_steps) * RELEARNING_ROWS * 3 if name == "durability" else 0
    membership = 0 if name != "audit" else 3 * tier.membership_images * len(tier.membership_t) * tier.membership_noises
    drawing = drawn * task.steps * guided / PEAK[tier.precision]
    return (drawing + (trained + membership) / PEAK["fp32"]) * network.flops / SHARE


def _at(data: Any, key: str) -> tuple[Any, Any]:
    """(value, what holds it) at a dotted key; numbers are places of a list."""
    holder = None
    for part in key.split("."):
        holder = data
        try:
            data = data[int(part)] if isinstance(data, list) else data.get(part)
        except (IndexError, AttributeError):
            return None, holder
    return data, holder


def _there(value: str, holder: Any) -> bool:
    if isinstance(holder, dict) and holder.get("torchvision"):
        return (Path(value) / TORCHVISION[holder["torchvision"]]).is_dir()
    if isinstance(holder, dict) and holder.get("shards"):
        from braceexpand import braceexpand

        return "://" in value or all(Path(p).is_file() for p in braceexpand(value))
    if is_hub_id(value) and not Path(value).exists():
        from huggingface_hub import try_to_load_from_cache

        return any(isinstance(try_to_load_from_cache(value, f), str) for f in ("model_index.json", "config.json"))
    return Path(value).exists()


def _hours(hours: float) -> str:
    return f"{hours:.0f} h" if hours >= 10 else f"{hours:.1f} h" if hours >= 0.1 else f"{hours * 60:.1f} min"
