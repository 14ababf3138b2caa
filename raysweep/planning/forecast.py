"""Forecasts a paper's experiment from its config alone: plan on a cluster, GPU-hours, disk, memory, and missing inputs.

Arithmetic is counted (`raysweep.planning.footprint`); time is that arithmetic at an assumed share of an H100's peak. Memory is
the weights and states that a method says it holds, and the activations of its batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from methods.base import Descent
from raysweep.config import draws, presets
from raysweep.config.schema import ConfigError, Sweep, Tier
from raysweep.engine.arrival import expected_nodes
from raysweep.engine.expectation import nodes_of_file
from raysweep.engine.resources import Plan, make_plan
from raysweep.models.folders import is_hub_id
from raysweep.planning import disk, footprint
from raysweep.planning.dry_run import typical
from raysweep.planning.footprint import SINGLE, Footprint
from raysweep.planning.utilisation import in_words, simulated
from raysweep.registry import attacks, resolve
from raysweep.search.spaces import Space
from raysweep.search.spaces import load as load_space
from raysweep.search.utilisation import Timeline
from raysweep.storage.code_digests import ROOT
from raysweep.tasks.images import ImagesTask
from raysweep.tasks.sources import TORCHVISION

PEAK = {"fp32": 67e12, "bf16": 989e12}  # operations per second of an H100 SXM by its data sheet, without sparsity
SHARE = 0.3  # assumed share of that peak
RELEARNING_ROWS = 64  # batch size of attacks that train
CLUSTER = "cluster.yaml"


@dataclass(frozen=True)
class Forecast:
    """GPU-hours by part, and peak bytes on a GPU by method."""

    training: float
    search: float
    audit: float
    memory: dict[str, float]

    @property
    def gpu_hours(self) -> float:
        return self.training + self.search + self.audit


def images_task(sweep: Sweep) -> ImagesTask:
    """The task of a preset, which is always of the kind `images`: the user's model and images."""
    assert isinstance(sweep.task, ImagesTask)
    return sweep.task


def retrained(sweep: Sweep) -> int:
    """How many models a preset trains from scratch: base and oracles, unless they are given."""
    task = images_task(sweep)
    return (0 if task.trained else 1) + (0 if sweep.oracle_models or not task.base_steps else sweep.oracles)


def missing(sweep: Sweep, about: presets.About) -> list[tuple[presets.Bring, str]]:
    """The inputs that a preset needs from the user and that do not exist: (input, the value of its setting)."""
    data = sweep.resolved()
    inputs = []
    for item in about.bring:
        value, parent = _setting_at(data, item.key)
        values = value if isinstance(value, list) else [value]
        absent = [str(v) for v in values if v is None or not _exists(str(v), parent)]
        if absent or not values:
            inputs.append((item, ", ".join(absent) or "not set"))
    return inputs


def cluster_file() -> Path:
    """The launcher file in the working directory, else in the source tree; raises ConfigError if there is neither."""
    for path in (Path(CLUSTER), ROOT / CLUSTER):
        if path.is_file():
            return path
    raise ConfigError(f"{CLUSTER}: not in this folder, so there is no cluster to plan for")


def forecast(sweep: Sweep, network: Footprint, spaces: list[Space]) -> Forecast:
    """The cost of a sweep over a network."""
    task = images_task(sweep)
    single = network.flops / (SHARE * PEAK["fp32"])
    recipe = task.recipe
    # a step costs three forward passes: one forward, and a backward pass that counts twice
    training = retrained(sweep) * task.base_steps * recipe.get("batch_size", 64) * 3 * single
    trials = sweep.search.trials // len(spaces)
    search = 0.0
    for space in spaces:
        search += trials * typical(space).get("steps", 1) * _step_seconds(sweep, network, space)
    search += (sweep.search.trials + sweep.oracles + 2) * _audit_seconds(sweep, network, "probe")
    audited = min(sweep.audit.top, sweep.search.trials) * sweep.audit.rounds + sweep.oracles + 2
    attacked = sweep.audit.finalists + sweep.oracles + 1
    chosen = sweep.audit.durability.checks
    attack_count = len(attacks() if chosen is None else chosen)
    audit = audited * _audit_seconds(sweep, network, "audit")
    audit += attacked * _audit_seconds(sweep, network, "durability") * attack_count
    return Forecast(
        training=training / 3600,
        search=search / 3600,
        audit=audit / 3600,
        memory={space.method: _memory(sweep, network, space) for space in spaces},
    )


def wall_hours(cost: Forecast, plan: Plan, search: Timeline) -> float:
    """Hours that a sweep takes with a plan: training, then the search as simulated, then the audits on all auditors."""
    return cost.training + search.seconds / 3600 + cost.audit / max(1.0, plan.auditors + plan.late_auditors)


def disk_of(sweep: Sweep, network: Footprint, plan: Plan) -> disk.Disk:
    """What a sweep over a network needs on disk."""
    candidate = SINGLE * (network.adaptable if sweep.train.lora else network.trained(sweep.train.modules))
    return disk.of(sweep, plan, candidate, network.saved, retrained(sweep))


def describe(sweep: Sweep, about: presets.About) -> list[tuple[str, str]]:
    """The lines of a preset's dry run: (topic, text)."""
    network = footprint.of(about.network)
    spaces = [load_space(name, sweep.spaces.get(name), images_task(sweep).kind) for name in sweep.methods]
    expected, file = expected_nodes(sweep), cluster_file()
    plan = make_plan(expected or nodes_of_file(file), sweep)
    cost, search = forecast(sweep, network, spaces), timeline(sweep, network, spaces, plan)
    share = sweep.search.trials // len(sweep.methods)
    training = _hours(cost.training) if cost.training else "are given"
    tera = {precision: f"{peak / 1e12:.0f}" for precision, peak in PEAK.items()}
    return [
        ("preset", f"{about.title}; {about.paper}"),
        *(("protocol", line) for line in about.protocol),
        *(("differs", line) for line in about.differs),
        ("search", f"{sweep.search.trials} trials: {share} each of {', '.join(sweep.methods)}; {sweep.search.sampler}"),
        ("cluster", f"{'resources.expect' if expected else file}: {plan.describe()}"),
        ("slots", in_words(sweep, plan, search)),
        ("network", f"{network.parameters / 1e6:.1f} M weights, {network.flops / 1e9:.3g} GFLOP per image and pass"),
        (
            "cost",
            f"about {_hours(cost.gpu_hours)} of an H100: base and oracles {training}, search {_hours(cost.search)}, audits "
            f"{_hours(cost.audit)}; about {_hours(wall_hours(cost, plan, search))} on this cluster",
        ),
        ("assumes", f"{SHARE:.0%} of {tera['fp32']} TFLOP/s in single precision, of {tera['bf16']} in bf16"),
        ("memory", "; ".join(f"{n} {size / 1e9:.1f} GB" for n, size in cost.memory.items()) + " on one GPU"),
        ("disk", disk_of(sweep, network, plan).in_words(sweep.candidates.keep)),
        *(("missing", f"{item.key} ({value}): {item.what}; {item.get}") for item, value in missing(sweep, about)),
    ]


def _step_seconds(sweep: Sweep, network: Footprint, space: Space) -> float:
    """Seconds of one step of a method on one GPU."""
    rows = typical(space).get("batch_size", 64) * resolve("method", space.method).forwards_per_step
    return float(rows * network.flops / (SHARE * PEAK[sweep.train.precision]))


def timeline(sweep: Sweep, network: Footprint, spaces: list[Space], plan: Plan) -> Timeline:
    """The search in simulated time."""
    gpus = plan.workers * plan.worker_gpus
    step_s = {space.method: _step_seconds(sweep, network, space) / max(1.0, gpus) for space in spaces}
    return simulated(sweep, spaces, plan, step_s, _audit_seconds(sweep, network, "probe"))


def _memory(sweep: Sweep, network: Footprint, space: Space) -> float:
    """Peak bytes on one worker: a training step, and the base model that is kept for the next job."""
    method, settings = resolve("method", space.method), typical(space)
    rows = settings.get("batch_size", 64) / sweep.train.workers
    base = network.saved - SINGLE * network.others.get("vae", 0)  # an autoencoder is shared
    average = 0
    if issubclass(method, Descent) and settings.get("ema", method.Hyperparameters.model_fields["ema"].default) > 0:
        average = SINGLE * network.trained(sweep.train.modules)
    return network.step(method, rows, sweep.train.modules, sweep.train.precision) + base + average


def _audit_seconds(sweep: Sweep, network: Footprint, name: str) -> float:
    """Seconds of one model's audit at a tier, from its number of forward passes, to the leading order."""
    tier: Tier = getattr(sweep.audit, name)
    task = images_task(sweep)
    guided = 1 if task.guidance in (0, 1) else 2
    drawn = tier.class_samples if name == "durability" else 2 * tier.samples + tier.class_samples
    trained = sum(tier.relearn_steps) * RELEARNING_ROWS * 3 if name == "durability" else 0
    times = len(tier.membership_t or draws.MEMBERSHIP_T[1:])
    membership = 0 if name != "audit" else 3 * tier.membership_images * times * tier.membership_noises
    drawing = drawn * (tier.sampling_steps or task.steps) * guided / PEAK[tier.precision]
    return (drawing + (trained + membership) / PEAK["fp32"]) * network.flops / SHARE


def _setting_at(data: Any, key: str) -> tuple[Any, Any]:
    """(value, the mapping or list that holds it) at a dotted key, where numbers index lists; (None, ...) if there is none."""
    parent = None
    for part in key.split("."):
        parent = data
        try:
            data = data[int(part)] if isinstance(data, list) else data.get(part)
        except (IndexError, AttributeError):
            return None, parent
    return data, parent


def _exists(value: str, parent: Any) -> bool:
    """Whether the files that a setting names exist: a torchvision data set, shards, a model on the hub's cache, or a path."""
    if isinstance(parent, dict) and parent.get("torchvision"):
        return (Path(value) / TORCHVISION[parent["torchvision"]]).is_dir()
    if isinstance(parent, dict) and parent.get("shards"):
        from braceexpand import braceexpand

        return "://" in value or all(Path(p).is_file() for p in braceexpand(value))
    if is_hub_id(value) and not Path(value).exists():
        from huggingface_hub import try_to_load_from_cache

        return any(isinstance(try_to_load_from_cache(value, f), str) for f in ("model_index.json", "config.json"))
    return Path(value).exists()


def _hours(hours: float) -> str:
    return f"{hours:.0f} h" if hours >= 10 else f"{hours:.1f} h" if hours >= 0.1 else f"{hours * 60:.1f} min"
