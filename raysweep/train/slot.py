"""A slot: an actor on a node for training that does one job of the broker after another.

With one worker per trial the actor's process is the worker, by Ray Train's local mode: a Train run of its own would add three
helper processes to each. With several workers the actor holds a Train run, whose rank 0 asks the broker, and whose controller and
helpers lie on the actor's node. When a slot's process or node dies, the steward hires another slot.
"""

from __future__ import annotations

import uuid

import ray
from ray.actor import ActorHandle
from ray.train import FailureConfig, RunConfig, ScalingConfig

from raysweep.train.executors import CONTROLLER_FAILURES
from raysweep.train.worker import serve


@ray.remote(num_cpus=0)
class Slot:
    """Does jobs until the broker lets it end."""

    def serve(self, broker: ActorHandle, name: str, scaling: ScalingConfig, storage: str) -> None:
        """Does jobs as the worker `name`. scaling: of a trial; storage: the folder of Train's own files."""
        from ray.train.torch import TorchTrainer

        alone = scaling.num_workers == 1
        trainer = TorchTrainer(
            serve,
            train_loop_config={"broker": broker, "worker": name},
            scaling_config=ScalingConfig(num_workers=0, use_gpu=scaling.use_gpu) if alone else scaling,
            run_config=RunConfig(
                name=f"{name}-{uuid.uuid4().hex[:16]}",  # each time another: Train would resume a name that exists
                storage_path=storage,
                failure_config=FailureConfig(max_failures=-1, controller_failure_limit=CONTROLLER_FAILURES),
            ),
        )
        trainer.fit()


def slot_options(scaling: ScalingConfig, light: dict[str, float]) -> dict[str, object]:
    """Options of a slot's actor: the resources of its only worker, or `light` ones where a Train run reserves the workers'."""
    if scaling.num_workers > 1:
        return {"num_cpus": 0, "resources": light, "scheduling_strategy": "SPREAD"}
    resources = scaling.resources_per_worker or {}
    options: dict[str, object] = {"num_cpus": resources.get("CPU", 0), "num_gpus": resources.get("GPU", 0)}
    return options | ({"label_selector": scaling.label_selector} if scaling.label_selector else {})
