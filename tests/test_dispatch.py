"""Leases and desks without Ray: every task is done once, whatever happens to workers and to the desk itself."""

from __future__ import annotations

import asyncio
import random

import pytest

from raysweep.dispatch import desk as desk_module
from raysweep.dispatch.desk import Assignment, Closed, Desk
from raysweep.dispatch.leases import Leases


class Errands(Desk[str, str]):
    """A desk whose outcomes are words."""

    def failure(self, key: str, reason: str) -> str:
        return f"failed: {reason}"


def play(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


async def soon() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


def test_a_lease_ends_without_heartbeat_and_its_worker_is_then_not_heard():
    leases = Leases(attempts=3, lease_s=10)
    assert leases.add("a")
    assert not leases.add("a")
    first = leases.take("w1", now=0)
    assert leases.take("w2", now=0) is None
    assert leases.renew("w1", "a", first.token, now=9)
    assert not leases.expired(now=18)
    assert [lease.key for lease in leases.expired(now=20)] == ["a"]
    assert leases.put_back("a", counts=True)
    second = leases.take("w2", now=20)
    assert not leases.renew("w1", "a", first.token, now=21)
    assert leases.renew("w2", "a", second.token, now=21)
    leases.end("a")
    assert not leases.renew("w2", "a", second.token, now=22)
    assert not leases.add("a")


def test_only_lost_processes_and_failures_use_up_attempts():
    leases = Leases(attempts=2, lease_s=10)
    leases.add("a")
    for _ in range(5):
        leases.take("w", now=0)
        assert leases.put_back("a", counts=False)
    leases.take("w", now=0)
    assert leases.put_back("a", counts=True)
    leases.take("w", now=0)
    assert not leases.put_back("a", counts=True)


def test_after_a_restart_workers_register_what_they_do():
    before = Leases(attempts=3, lease_s=10)
    before.add("a")
    token = before.take("w1", now=0).token
    for submitted_first in (True, False):
        after = Leases(attempts=3, lease_s=10)
        if submitted_first:
            after.add("a")
        assert after.renew("w1", "a", token, now=1)
        assert not after.add("a")
        assert after.take("w2", now=1) is None
    late = Leases(attempts=3, lease_s=10)
    late.add("a")
    other = late.take("w2", now=0)  # before w1 registered
    assert other.token != token
    assert not late.renew("w1", "a", token, now=1)


def test_random_histories_end_every_task_once():
    """Workers die, fall silent and come back, nodes are lost: each task ends once, by the worker that has it."""
    for seed in range(300):
        rng = random.Random(seed)
        leases, ended, now = Leases(attempts=1000, lease_s=5), [], 0.0
        keys = [f"k{i}" for i in range(rng.randint(1, 12))]
        for key in keys:
            leases.add(key)
        believed: dict[str, tuple[str, str]] = {}  # worker -> (key, token) as the worker sees it
        while len(ended) < len(keys):
            now += rng.random() * 3
            worker = f"w{rng.randrange(5)}"
            event = rng.random()
            if worker not in believed:
                if worker in leases.works:
                    leases.put_back(leases.works[worker], counts=True)
                lease = leases.take(worker, now)
                if lease is not None:
                    believed[worker] = (lease.key, lease.token)
            elif event < 0.2:
                del believed[worker]  # its process died
            elif event < 0.5:
                if not leases.renew(worker, *believed[worker], now):
                    del believed[worker]
            elif event < 0.8:
                key, token = believed.pop(worker)
                if leases.renew(worker, key, token, now):
                    leases.end(key)
                    ended.append(key)
            for lease in leases.expired(now):
                leases.put_back(lease.key, counts=True)
        assert sorted(ended) == sorted(keys)
        assert not leases.held
        assert not leases.queue


def test_a_task_that_is_submitted_twice_is_done_once():
    async def story():
        desk = Errands(3)
        callers = [asyncio.ensure_future(desk.submit("a", "task")) for _ in range(3)]
        await soon()
        given = await desk.next("w", "n", True)
        assert (given.key, given.task) == ("a", "task")
        assert await desk.finish("w", "a", given.token, "done")
        assert await asyncio.gather(*callers) == ["done"] * 3
        assert await desk.submit("a", "task") == "done"
        assert not await desk.finish("w", "a", given.token, "done again")

    play(story())


def test_thousands_of_callers_wait_and_nothing_waits_for_them():
    async def story():
        desk = Errands(3)
        callers = [asyncio.ensure_future(desk.submit(f"k{i}", "t")) for i in range(5000)]
        await soon()
        for i in range(5000):
            given = await desk.next(f"w{i % 7}", "n", i < 7)
            assert (await desk.census())["queued"] == 4999 - i
            await desk.finish(f"w{i % 7}", given.key, given.token, given.key)
        assert await asyncio.gather(*callers) == [f"k{i}" for i in range(5000)]

    play(story())


def test_a_task_whose_worker_always_dies_ends_as_failed():
    async def story():
        desk = Errands(3)
        caller = asyncio.ensure_future(desk.submit("p", "poison"))
        await soon()
        for _ in range(3):
            assert (await desk.next("w", "n", True)).key == "p"
        idle = asyncio.ensure_future(desk.next("w", "n", True))
        assert await caller == "failed: its worker died"
        await desk.close()
        assert await idle == "stop"

    play(story())


def test_the_loss_of_a_node_frees_its_tasks_at_once_and_is_no_attempt():
    async def story():
        desk = Errands(1)
        callers = [asyncio.ensure_future(desk.submit(key, "t")) for key in "ab"]
        await soon()
        lost = await desk.next("w1", "lost", True)
        kept = await desk.next("w2", "kept", True)
        waiting = asyncio.ensure_future(desk.next("w3", "kept", True))
        await soon()
        await desk.forget([], ["lost"])
        again = await waiting
        assert again.key == lost.key
        assert await desk.beat("w1", lost.key, lost.token) == "lost"
        assert not await desk.finish("w1", lost.key, lost.token, "late")
        await desk.finish("w3", again.key, again.token, "A")
        await desk.finish("w2", kept.key, kept.token, "B")
        assert await asyncio.gather(*callers) == ["A", "B"]
        assert (await desk.census())["workers"].keys() == {"w2", "w3"}

    play(story())


@pytest.mark.parametrize("how", ["forgotten", "started again"])
def test_a_worker_that_died_while_it_waited_gets_no_task(how):
    """Its call still waits at the desk; a task that it took would be lost for the length of a lease."""

    async def story():
        desk = Errands(3)
        dead = asyncio.ensure_future(desk.next("w1", "n", True))
        await soon()
        if how == "forgotten":
            await desk.forget(["w1"])
        alive = asyncio.ensure_future(desk.next("w2" if how == "forgotten" else "w1", "n", True))
        await soon()
        caller = asyncio.ensure_future(desk.submit("a", "t"))
        given = await asyncio.wait_for(alive, 5)
        assert given.key == "a"
        assert await asyncio.wait_for(dead, 5) == "stop"
        await desk.finish("w2" if how == "forgotten" else "w1", "a", given.token, "done")
        assert await caller == "done"

    play(story())


def test_a_call_that_arrives_after_its_worker_was_forgotten_gets_no_task():
    async def story():
        desk = Errands(3)
        await desk.forget(["w1"])
        caller = asyncio.ensure_future(desk.submit("a", "t"))
        assert await desk.next("w1", "n", True) == "stop"
        assert desk.nodes == {}
        given = await desk.next("w2", "n", True)
        await desk.finish("w2", "a", given.token, "done")
        assert await caller == "done"

    play(story())


def test_a_task_counts_as_an_attempt_only_if_its_worker_had_begun_it():
    async def story():
        desk = Errands(1)
        caller = asyncio.ensure_future(desk.submit("a", "t"))
        await desk.next("w1", "n", True)  # the answer reaches nobody
        await desk.forget(["w1"], died=True)
        given = await desk.next("w2", "n", True)
        await desk.beat("w2", "a", given.token)
        await desk.forget(["w2"], died=True)
        assert "died" in await asyncio.wait_for(caller, 5)

    play(story())


def test_workers_on_barred_nodes_get_no_task_and_keep_it_from_nobody():
    async def story():
        desk = Errands(3)
        await desk.bar(["bad"])
        barred = [asyncio.ensure_future(desk.next(f"b{k}", "bad", True)) for k in range(2)]
        before = asyncio.ensure_future(desk.next("w1", "late", True))
        await soon()
        await desk.bar(["bad", "late"])  # w1 asked before its node was barred
        other = asyncio.ensure_future(desk.next("w2", "good", True))
        await soon()
        callers = [asyncio.ensure_future(desk.submit("a", "t"))]
        assert (await asyncio.wait_for(other, 5)).key == "a"
        callers.append(asyncio.ensure_future(desk.submit("b", "t")))
        await soon()
        assert not any(call.done() for call in (*barred, before))
        await desk.bar([])
        await asyncio.wait([*barred, before], timeout=5, return_when=asyncio.FIRST_COMPLETED)
        assert [call.result().key for call in (*barred, before) if call.done()] == ["b"]
        await desk.close()
        await asyncio.wait(callers)
        assert all(isinstance(caller.exception(), Closed) for caller in callers)

    play(story())


def test_workers_that_leave_give_their_tasks_back():
    async def story():
        desk = Errands(1)
        caller = asyncio.ensure_future(desk.submit("a", "t"))
        await soon()
        given = await desk.next("w1", "n", True)
        idle = asyncio.ensure_future(desk.next("w2", "n", True))
        await soon()
        await desk.leave(["w1", "w2"])
        assert await idle == "stop"
        assert await desk.beat("w1", "a", given.token, (3, 9, 0.5)) == "leave"
        assert (await desk.census())["progress"] == {"a": (3, 9, 0.5)}
        await desk.put_back("w1", "a", given.token)
        assert await desk.next("w1", "n", False) == "stop"
        third = await desk.next("w3", "n", True)
        await desk.finish("w3", "a", third.token, "done")
        assert await caller == "done"

    play(story())


def test_silent_workers_lose_their_tasks_and_are_named():
    async def story():
        desk, clock = Errands(2), [0.0]
        desk.clock = lambda: clock[0]
        caller = asyncio.ensure_future(desk.submit("a", "t"))
        await soon()
        given = await desk.next("w1", "n", True)
        clock[0] += desk_module.LEASE_S / 2
        assert await desk.beat("w1", "a", given.token) == "held"
        clock[0] += desk_module.LEASE_S + 1
        census = await desk.census()
        assert (census["silent"], census["queued"]) == (["w1"], 1)
        again = await desk.next("w2", "n", True)
        await desk.finish("w2", "a", again.token, "done")
        assert await caller == "done"
        assert not await desk.finish("w1", "a", given.token, "late")

    play(story())


def test_a_task_that_only_its_worker_knew_after_a_restart_can_still_be_submitted():
    """The worker registered before the caller asked again, and then died."""

    async def story():
        desk = Errands(1)
        assert await desk.beat("w1", "a", "a token of the desk before") == "held"
        fresh = asyncio.ensure_future(desk.next("w1", "n", True))
        await soon()
        assert not fresh.done()
        caller = asyncio.ensure_future(desk.submit("a", "t"))
        given = await fresh
        assert (given.key, given.task) == ("a", "t")
        await desk.finish("w1", "a", given.token, "done")
        assert await caller == "done"

    play(story())


def test_failures_are_tried_again_as_often_as_allowed():
    async def story():
        desk = Errands(3)
        caller = asyncio.ensure_future(desk.submit("a", "t"))
        await soon()
        for attempt in range(3):
            given = await desk.next("w", "n", attempt == 0)
            await desk.finish("w", "a", given.token, f"attempt {attempt}", again=True)
        assert await caller == "attempt 2"

    play(story())


def test_closing_answers_callers_and_workers():
    async def story():
        desk = Errands(3)
        caller = asyncio.ensure_future(desk.submit("a", "t"))
        await soon()
        assert isinstance(await desk.next("w1", "n", True), Assignment)
        idle = asyncio.ensure_future(desk.next("w2", "n", True))
        await soon()
        await desk.close()
        assert await idle == "stop"
        for call in (caller, desk.submit("b", "t")):
            with pytest.raises(RuntimeError, match="the run has ended"):
                await call

    play(story())


@pytest.mark.parametrize("waiters", [1, 4])
def test_a_task_wakes_one_of_the_workers_that_wait(waiters):
    async def story():
        desk = Errands(3)
        asking = [asyncio.ensure_future(desk.next(f"w{i}", "n", True)) for i in range(waiters)]
        await soon()
        callers = [asyncio.ensure_future(desk.submit(f"k{i}", "t")) for i in range(waiters)]
        given = await asyncio.wait_for(asyncio.gather(*asking), 5)
        assert {g.key for g in given} == {f"k{i}" for i in range(waiters)}
        for i, g in enumerate(given):
            await desk.finish(f"w{i}", g.key, g.token, "done")
        await asyncio.gather(*callers)

    play(story())
