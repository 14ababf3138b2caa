"""Workers, auditors and the manager die, hang and fail; each job and audit is still done exactly once. Real Ray."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
import time
import urllib.request

import pytest
import ray
import torch
from small import install_faulty
from tiny import LATENT, latent_task, tiny_model, tiny_task

from evaluators.judge import train_judge
from raysweep.auditing.auditor import Auditor
from raysweep.auditing.log import LOG
from raysweep.auditing.manager import AuditManager, Replaced
from raysweep.auditing.request import AuditRequest, Chore, failed
from raysweep.config.schema import Tier
from raysweep.dispatch.desk import Closed
from raysweep.engine import audits
from raysweep.engine.cluster import RunFailed
from raysweep.engine.steward import Crew
from raysweep.models.latent import LatentText
from raysweep.settings import TIMEOUT
from raysweep.storage.cache import load_tensors, save_tensors
from raysweep.train.broker import NAMESPACE, Broker, Usage
from raysweep.train.executors import Isolated, Warm
from raysweep.train.jobs import Job, finished
from raysweep.train.slot import Slot, slot_options

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
    """A slot of one worker."""
    from ray.train import ScalingConfig

    broker = Broker.remote()
    scaling = ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.5})

    def hire(name, role):
        slot = Slot.options(**slot_options(scaling, {})).remote()
        return slot, slot.serve.remote(broker, name, scaling, str(folder / "train"))

    executor = Warm(broker)
    with manned(Crew("slot", broker, hire), 1):
        outcome = executor.run(job(folder, "first"))
        assert outcome.status == "ok", outcome.reason
        yield executor
    ray.get(broker.close.remote())


@contextlib.contextmanager
def manned(crew: Crew, number: int):
    """Keeps a crew at a number of workers inside the block, as the steward does."""
    ended, alive = threading.Event(), [node["NodeID"] for node in ray.nodes()]

    def look():
        with contextlib.suppress(Closed):
            while not ended.wait(0.3):
                census = ray.get(crew.desk.census.remote())
                crew.reap(census, alive)
                crew.adjust({"": number}, census)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        for member in crew.members.values():
            ray.kill(member.actor)


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


@pytest.fixture
def audit_pool(folder, request):
    """(a manager of a new run, its two auditors, the run's folder); auditors that die are replaced.

    A parameter of the test is the time limit of an audit, in seconds.
    """
    run = folder / request.node.name
    run.mkdir()
    manager, limit = AuditManager.remote(str(run), 3), getattr(request, "param", 120)

    def hire(name, role):
        auditor = Auditor.remote()
        return auditor, auditor.serve.remote(manager, name, limit)

    crew = Crew("auditor", manager, hire)
    with manned(crew, 2):
        yield manager, crew, run
    ray.kill(manager)


def ask(manager, request):
    return manager.submit.remote(request.key, request)


def test_every_audit_is_done_once_though_auditor_and_manager_are_killed(folder, audit_pool):
    manager, crew, run = audit_pool
    pending = [ask(manager, request(folder, f"s{k}", run)) for k in range(10)]
    ray.wait(pending, num_returns=2)
    ray.kill(next(iter(crew.members.values())).actor)
    ray.wait(pending, num_returns=5)
    os.kill(ray.get(manager.pid.remote()), signal.SIGKILL)
    answers = ray.get(pending, timeout=200)
    assert [a["reason"] for a in answers if a["status"] != "ok"] == []
    keys = [json.loads(line)["key"] for line in (run / LOG).read_text().splitlines() if line]
    assert len(keys) == len(set(keys)) == 10
    assert len(list((run / "rows").glob("*.parquet"))) == 10


def test_a_failed_audit_is_recorded_and_the_others_continue(folder, audit_pool):
    manager, _, run = audit_pool
    bad = request(folder, "bad", run)
    bad = AuditRequest(**{**vars(bad), "model": str(folder / "absent")})
    chore = Chore("train_judge", (str(folder / "task"), 0, "probe", str(folder / "absent" / "judge")))
    failed, fine, judge = ray.get([ask(manager, bad), ask(manager, request(folder, "good", run)), ask(manager, chore)])
    assert failed["status"] == "failed"
    assert "not a diffusers pipeline folder" in failed["reason"]
    assert "3 attempts" in failed["reason"]
    assert fine["status"] == "ok"
    assert fine["images"] >= TIER.samples
    assert judge["status"] == "failed"
    assert sorted(json.loads(line)["status"] for line in (run / LOG).read_text().splitlines() if line) == [
        "failed",
        "ok",
    ]


@pytest.mark.parametrize("audit_pool", [0.01], indirect=True)
def test_an_audit_that_hangs_is_ended_by_its_time_limit(folder, audit_pool):
    manager, _, run = audit_pool
    answer = ray.get(ask(manager, request(folder, "slow", run)), timeout=200)
    assert (answer["status"], answer["limit"]) == ("failed", TIMEOUT)
    assert answer["reason"] == "no answer within 0.01 s (3 attempts)"


def test_a_log_that_cannot_be_written_delays_answers_and_loses_none(folder, audit_pool):
    manager, _, run = audit_pool
    (run / LOG).mkdir()  # stands for a full disk: opening the file is an error of the system
    answer = ask(manager, request(folder, "s", run))
    deadline = time.monotonic() + 100
    while not (trouble := ray.get(manager.census.remote())["trouble"]):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert LOG in trouble
    (run / LOG).rmdir()
    assert ray.get(answer, timeout=60)["status"] == "ok"
    assert LOG not in ray.get(manager.census.remote())["trouble"]


def test_an_audit_is_logged_once_though_its_report_comes_twice(tmp_path):
    """A manager died after it had written the outcome and before it answered: Ray repeats the auditor's call to the next one."""
    kind, done = (
        AuditManager.__ray_metadata__.modified_class,
        {"status": "ok", "reason": "", "seconds": 1.0, "failed": []},
    )

    async def report(manager):
        return await manager.finish("auditor-0", "key", "token", done)

    assert asyncio.run(report(kind(str(tmp_path), 3)))
    again = kind(str(tmp_path), 3)
    assert not asyncio.run(report(again))
    assert asyncio.run(again.submit("key", None)) == done
    assert (tmp_path / LOG).read_text().count("key") == 2  # of one line: {"key": "key", ...}


def test_every_outcome_of_the_manager_has_what_a_trial_reads(tmp_path):
    outcome = AuditManager.__ray_metadata__.modified_class(str(tmp_path), 3).failure("key", "its worker died")
    assert outcome == failed("its worker died (3 attempts)")
    assert outcome["limit"] == ""


def test_a_manager_that_has_to_give_up_ends_the_run_with_its_reason(monkeypatch):
    def closed(_):
        raise Closed("audits.jsonl cannot be written (No space left on device); make room")

    monkeypatch.setattr(audits.ray, "get", closed)
    with pytest.raises(RunFailed, match="No space left on device"):
        audits.answer_to(None)


def test_a_manager_that_was_replaced_does_not_write(tmp_path):
    """Both managers alone, without processes: the second one owns the log."""
    kind = AuditManager.__ray_metadata__.modified_class
    first = kind(str(tmp_path), 3)
    first._append("one")
    second = kind(str(tmp_path), 3)
    second._append("two")
    with pytest.raises(Replaced):
        first._append("three")
    assert (tmp_path / LOG).read_text() == "onetwo"


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


def test_the_share_of_time_in_which_slots_are_idle():
    """Two slots; the time before the first job and after the last does not count."""
    usage = Usage()
    assert usage.idle is None
    for workers, busy, now in ((2, 0, 0.0), (2, 1, 10.0), (2, 2, 11.0), (2, 1, 13.0), (2, 0, 14.0), (2, 0, 99.0)):
        usage.change(workers, busy, now)
    assert usage.idle == pytest.approx(1 - 6 / 8)
