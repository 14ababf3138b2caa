"""Workers, auditors and the manager die, hang and fail; each job and audit is still done exactly once. Real Ray."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
import urllib.request

import pytest
import ray
import torch
from small import install_faulty
from tiny import LATENT, latent_task, tiny_model, tiny_task

from evaluators.judge import train_judge
from raysweep.auditing.auditor import Auditor
from raysweep.auditing.manager import LOG, AuditManager
from raysweep.auditing.request import AuditRequest
from raysweep.config.schema import Tier
from raysweep.models.latent import LatentText
from raysweep.storage.cache import load_tensors, save_tensors
from raysweep.train.broker import ATTEMPTS, NAMESPACE, Broker
from raysweep.train.executors import Isolated, Warm, start_group, stop_groups
from raysweep.train.jobs import Job, Outcome, finished

pytestmark = pytest.mark.timeout(400)
TIER = Tier(
    seed=1, judge="probe", groups=5, samples=20, noises=8, loss_noises=6, loss_images=4, timesteps=3, class_samples=10
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a task, a base model and a judge, and a local Ray with the faulty methods installed."""
    folder = tmp_path_factory.mktemp("faults")
    path = install_faulty(folder / "faulty")
    variables = {
        "PYTHONPATH": path,
        "FAULTY_MARK": str(folder / "mark"),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "OMP_NUM_THREADS": "1",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    }
    os.environ.update({k: v for k, v in variables.items() if k.startswith("RAY_")})
    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=200 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
        namespace=NAMESPACE,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        runtime_env={"env_vars": variables},
    )
    task = tiny_task()
    for part in ("task", "text/task"):
        (folder / part).mkdir(parents=True)
    task.save(folder / "task")
    tiny_model(task).save(folder / "base")
    split = task.splits["judge_probe"]
    save_tensors(folder / "judge.safetensors", train_judge(split.x, split.groups, 0, 20).state_dict())
    latent_task().save(folder / "text" / "task")
    LatentText.build(LATENT, 0).save(folder / "text" / "base")
    yield folder
    ray.shutdown()


def job(folder, name: str, method: str = "finetune", out: str | None = None, **more) -> Job:
    inputs = {"task": str(folder / "task"), "base": str(folder / "base")} | more
    settings, path = {"lr": 1e-3, "steps": 3, "batch_size": 8}, str(folder / "out" / (out or name))
    return Job(id=name, kind="train", method=method, hyperparameters=settings, seed=1, out=path, **inputs)


@pytest.fixture(scope="module")
def warm(folder):
    """A warm group of one worker."""
    from ray.train import ScalingConfig

    broker = Broker.remote()
    group = start_group(
        broker, 0, ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.5}), str(folder / "train")
    )
    executor = Warm(broker)
    outcome = executor.run(job(folder, "first"))
    assert outcome.status == "ok", outcome.reason
    yield executor
    stop_groups(broker, [group])
    assert not group.is_alive()


def test_a_job_that_is_done_is_not_done_again(folder, warm):
    started = time.monotonic()
    one = warm.run(job(folder, "a"))
    assert time.monotonic() - started < 15  # a separate group would take longer to start
    assert (one.status, warm.run(job(folder, "again", out="a"))) == ("ok", one)
    other = warm.run(job(folder, "b"))
    assert other.digest == one.digest


def test_faulty_methods_fail_with_a_reason_and_the_group_continues(folder, warm):
    assert warm.run(job(folder, "r", "raises")).reason == "RuntimeError: this method is broken"
    assert "the gradient is not finite" in warm.run(job(folder, "n", "nan")).reason
    assert "not a known method" in warm.run(job(folder, "u", "absent")).reason
    assert warm.run(job(folder, "c")).status == "ok"
    assert not (folder / "out" / "r").exists()


def test_the_job_of_a_worker_that_dies_is_repeated(folder, warm):
    outcome = warm.run(job(folder, "e", "exitsonce"))
    assert outcome.status == "ok", outcome.reason
    assert (folder / "mark").exists()


def test_a_job_that_hangs_is_ended_by_its_budget(folder, warm):
    outcome = warm.run(job(folder, "h", "hangs", budget_s=3))
    assert outcome.status == "failed"
    assert outcome.reason == "exceeded its budget of 3 s"
    assert warm.run(job(folder, "d")).status == "ok"


def test_isolated_and_warm_workers_give_the_same_weights(folder, warm):
    from ray.train import ScalingConfig

    scaling = ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.5})
    text = {"task": str(folder / "text" / "task"), "base": str(folder / "text" / "base")}
    outcome = Isolated(scaling, str(folder / "train")).run(job(folder, "i", **text))
    assert outcome.status == "ok", outcome.reason
    assert outcome.digest == warm.run(job(folder, "w", **text)).digest


def test_two_train_workers_give_the_weights_of_one(folder, warm):
    from ray.train import ScalingConfig

    scaling = ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5})
    assert Isolated(scaling, str(folder / "train")).run(job(folder, "two")).status == "ok"
    assert warm.run(job(folder, "one")).status == "ok"
    one, two = (
        load_tensors(folder / "out" / name / "unet" / "diffusion_pytorch_model.safetensors") for name in ("one", "two")
    )
    flat = [torch.cat([t[k].reshape(-1) for k in sorted(t)]) for t in (one, two)]
    assert float((flat[0] - flat[1]).norm() / flat[0].norm()) < 1e-5


def test_a_job_whose_worker_always_dies_ends_as_failed(tmp_path):
    """The broker alone, without processes: a group that comes back `fresh` has lost what it did."""
    broker = Broker.__ray_metadata__.modified_class()
    poison = Job("p", "train", "m", {}, 0, "t", None, str(tmp_path / "p"))

    async def play():
        waiting = asyncio.ensure_future(broker.submit(poison))
        await asyncio.sleep(0)
        for k in range(ATTEMPTS):
            assert (await broker.next(0, k > 0, None)).id == "p"
        idle = asyncio.ensure_future(broker.next(0, True, None))
        outcome = await waiting
        assert await broker.close() == []
        assert await idle == "stop"
        return outcome

    assert asyncio.run(play()).reason == f"its worker died {ATTEMPTS} times"


def test_a_broker_that_closes_names_the_workers_at_work(tmp_path):
    """They are ended then, because their jobs may take long; those without a job end by themselves."""
    broker = Broker.__ray_metadata__.modified_class()

    async def play():
        waiting = asyncio.ensure_future(broker.submit(Job("p", "train", "m", {}, 0, "t", None, str(tmp_path / "p"))))
        await asyncio.sleep(0)
        await broker.next(0, True, "at work")
        idle = asyncio.ensure_future(broker.next(1, True, "idle"))
        await asyncio.sleep(0)
        assert await broker.close() == ["at work"]
        assert await idle == "stop"
        with pytest.raises(RuntimeError, match="the run has ended"):
            await waiting

    asyncio.run(play())


def test_results_of_other_jobs_do_not_count_as_done(folder, warm):
    done = job(folder, "f")
    assert warm.run(done).status == "ok"
    assert finished(done) is not None
    changed = Job(**{**vars(done), "seed": 2})
    assert finished(changed) is None


def request(folder, name: str, run) -> AuditRequest:
    return AuditRequest(
        subject=name,
        method="finetune",
        model=str(folder / "base"),
        digest="x",
        tier_name="probe",
        tier=TIER,
        judge=str(folder / "judge.safetensors"),
        judge_digest="j",
        task=str(folder / "task"),
        task_digest="t",
        run=str(run),
    )


def test_every_audit_is_done_once_though_auditor_and_manager_are_killed(folder):
    run = folder / "run"
    run.mkdir()
    auditors = [Auditor.options(name=f"aud-{i}").remote() for i in range(2)]
    manager = AuditManager.options(name="mgr").remote(str(run), ["aud-0", "aud-1"], NAMESPACE, 3, 120)
    pending = [manager.audit.remote(request(folder, f"s{k}", run)) for k in range(10)]
    ray.wait(pending, num_returns=2)
    ray.kill(auditors[0], no_restart=False)
    ray.wait(pending, num_returns=5)
    os.kill(ray.get(manager.pid.remote()), signal.SIGKILL)
    answers = ray.get(pending, timeout=200)
    assert [a["reason"] for a in answers if a["status"] != "ok"] == []
    keys = [json.loads(line)["key"] for line in (run / LOG).read_text().splitlines() if line]
    assert len(keys) == len(set(keys)) == 10
    assert len(list((run / "rows").glob("*.parquet"))) == 10
    for actor in (*auditors, manager):
        ray.kill(actor)


def test_requests_wait_for_an_auditor_that_is_being_restarted(folder):
    run = folder / "run3"
    run.mkdir()
    auditor = Auditor.options(name="aud-r").remote()
    manager = AuditManager.remote(str(run), ["aud-r"], NAMESPACE, 2, 120)
    pending = [manager.audit.remote(request(folder, f"s{k}", run)) for k in range(5)]
    ray.wait(pending, num_returns=1)
    ray.kill(auditor, no_restart=False)  # it refuses every call until its process is up again
    answers = ray.get(pending, timeout=200)
    assert [a["reason"] for a in answers if a["status"] != "ok"] == []
    for actor in (auditor, manager):
        ray.kill(actor)


def test_every_caller_is_answered_before_a_run_ends(folder):
    """If the manager were killed first, Ray would print for each of them that it will be tried again."""
    run = folder / "run4"
    run.mkdir()
    auditor = Auditor.options(name="aud-c").remote()
    manager = AuditManager.remote(str(run), ["aud-c"], NAMESPACE, 2, 120)
    pending = [manager.audit.remote(request(folder, f"s{k}", run)) for k in range(20)]
    ray.wait(pending, num_returns=1)
    ray.get(manager.close.remote(), timeout=10)
    late = manager.audit.remote(request(folder, "late", run))
    with pytest.raises(RuntimeError, match="the run has ended"):
        ray.get(late, timeout=10)
    for actor in (auditor, manager):
        ray.kill(actor)
    refused = 0
    for waiting in pending:
        try:
            assert ray.get(waiting, timeout=10)["status"] == "ok"
        except RuntimeError as error:
            assert "the run has ended" in str(error)  # noqa: PT017
            refused += 1
    assert refused >= 15


def test_a_failed_audit_is_recorded_and_the_others_continue(folder):
    run = folder / "run2"
    run.mkdir()
    auditor = Auditor.options(name="aud-x").remote()
    manager = AuditManager.remote(str(run), ["aud-x"], NAMESPACE, 2, 120)
    bad = request(folder, "bad", run)
    bad = AuditRequest(**{**vars(bad), "model": str(folder / "absent")})
    failed, fine = ray.get([manager.audit.remote(r) for r in (bad, request(folder, "good", run))])
    assert failed["status"] == "failed"
    assert "not a diffusers pipeline folder" in failed["reason"]
    assert "2 attempts" in failed["reason"]
    assert fine["status"] == "ok"
    assert fine["images"] >= TIER.samples
    assert ray.get(manager.state.remote()) == {"done": 2, "pending": 0, "waiting": 0, "idle": 1}
    ray.kill(auditor)


def test_gauges_reach_rays_metrics(folder):
    """The metrics that the dashboard and Prometheus scrape."""
    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = {"raysweep_audit_queue", "raysweep_audit_seconds", "raysweep_audit_images_per_second"}
    deadline, missing = time.monotonic() + 60, wanted
    while missing and time.monotonic() < deadline:
        text = urllib.request.urlopen(address, timeout=10).read().decode()
        missing = {name for name in wanted if f"ray_{name}{{" not in text}
        time.sleep(1)
    assert not missing


def test_the_broker_measures_the_share_of_time_that_slots_are_idle():
    """The broker alone: two jobs with a pause between them."""
    broker = Broker.__ray_metadata__.modified_class()

    async def play():
        assert await broker.waited(1) is None
        for name in ("x", "y"):
            waiting = asyncio.ensure_future(broker.submit(Job(name, "train", "m", {}, 0, "t", None, name)))
            await asyncio.sleep(0)
            taken = await broker.next(0, False, None)
            await asyncio.sleep(0.05)
            await broker.finish(0, taken.id, Outcome("ok"))
            await waiting
            await asyncio.sleep(0.1)
        share = await broker.waited(1)
        await broker.watch()
        return share, await broker.waited(1)

    share, after = asyncio.run(play())
    assert 0.3 < share < 0.6
    assert after is None
