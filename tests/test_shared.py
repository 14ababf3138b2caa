"""Storage that nodes do not share is found out before anything starts, and named with its nodes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from raysweep.config.schema import ConfigError
from raysweep.engine import admission as admission_module
from raysweep.engine import shared
from raysweep.engine.admission import Admission
from raysweep.engine.cluster import alive_nodes
from raysweep.engine.resources import Node
from raysweep.engine.shared import Answer, Look, Stopped, appears, check_shared, complaint, look, name_of
from raysweep.storage.code_digests import ROOT
from raysweep.storage.files import temporary_path

A, B = Path("/mnt/runs/a"), Path("/mnt/cache")
HIDDEN = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
NODE_S = 60.0  # for a node to join


def node(identity: str, address: str, role: str = "", alive: bool = True) -> dict:
    labels = {"role": role} if role else {}
    return {"NodeID": identity, "NodeManagerAddress": address, "Alive": alive, "Labels": labels}


def test_the_message_names_folders_nodes_and_the_remedy():
    assert complaint([A, B], {"10.0.0.1": ["", ""], "10.0.0.2 (train)": ["", ""]}) == ""
    text = complaint([A, B], {"10.0.0.1": ["", ""], "10.0.0.2 (train)": ["does not exist on", "is another folder on"]})
    assert text.startswith(
        "the nodes do not share their storage: /mnt/runs/a does not exist on 10.0.0.2 (train); /mnt/cache is another folder on "
        "10.0.0.2 (train). To run on them, mount one file system"
    )
    assert "storage=FOLDER" in text
    many = complaint([A], {f"10.0.0.{k} (train)": ["does not exist on"] for k in range(1, 9)})
    assert "10.0.0.5 (train) and 3 more. To run" in many
    assert name_of(node("x", "10.0.0.2", "audit")) == "10.0.0.2 (audit)"


def test_a_node_answers_with_a_file_of_its_own(tmp_path):
    token = temporary_path(tmp_path / "shared")
    token.touch()
    found = look(token)
    assert found.reason == ""
    assert Path(found.token).parent == tmp_path
    assert {p.name for p in tmp_path.iterdir()} == {token.name, Path(found.token).name}


def test_a_node_leaves_nothing_in_a_folder_that_is_not_the_drivers(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "LAG_S", 0.2)
    assert look(tmp_path / "absent" / ".x.tmp") == Look("does not exist on")
    assert look(tmp_path / ".x.tmp") == Look("is another folder on")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_a_node_cannot_write_is_named():
    assert look(Path("/proc/version")).reason.startswith("cannot be written (")  # not by root either


def test_a_file_may_become_visible_late(tmp_path, monkeypatch):
    file = tmp_path / "late"
    timer = threading.Timer(0.3, file.touch)
    timer.start()
    assert appears(file)
    monkeypatch.setattr(shared, "LAG_S", 0.2)
    assert not appears(tmp_path / "never")


def test_one_node_needs_no_check(tmp_path):
    check_shared([node("a", "10.0.0.1"), node("b", "10.0.0.2", alive=False)], [tmp_path / "run"])
    assert not list(tmp_path.iterdir())


def test_a_node_that_dies_while_it_is_asked_is_left_out(monkeypatch):
    alive = iter(["ab", "ab"])  # then a alone
    monkeypatch.setattr(shared, "DECLARED_S", 1.2)
    monkeypatch.setattr(shared.ray, "nodes", lambda: [node(k, "10.0.0.1") for k in next(alive, "a")])
    assert shared._still_alive(["a", "b"], lambda: False) == {"a"}
    assert shared._still_alive([], lambda: False) == set()
    with pytest.raises(Stopped):
        shared._still_alive(["a"], lambda: True)


@pytest.fixture
def cluster(monkeypatch):
    """A control node and a train node; the driver is connected."""
    import ray
    from raylets import raylets

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with raylets("train") as made:
        ray.init(address=made.address, log_to_driver=False)
        try:
            yield made
        finally:
            ray.shutdown()


def check_that_it_gets_no_work(folder: Path, blind: str, name: str) -> None:
    """A node that joins a run and does not share its folder is named, and all that it offers is held."""
    import ray

    said: list[str] = []
    nodes = {n.id: n for n in alive_nodes()}
    admission = Admission(
        [folder], [k for k in nodes if k != blind], SimpleNamespace(say=lambda kind, text: said.append(text))
    )
    end = time.monotonic() + NODE_S
    while not said and time.monotonic() < end:
        assert set(admission.of(nodes)) == set(nodes) - {blind}
        time.sleep(0.2)
    assert said == [complaint([folder], {name: ["is another folder on"]})]
    free = {"CPU": 1}
    while "CPU" in free and time.monotonic() < end:
        free = ray._private.state.available_resources_per_node()[blind]
    assert "CPU" not in free
    admission.close()


def test_nodes_that_join_are_checked_once_and_admitted_if_they_share_the_folders(monkeypatch):
    """b shares, c does not, and of d it is not yet known because the driver could not write."""
    said, asked, occupied = [], [], []
    bad, good, silent = (
        Answer(["is another folder on"], True),
        Answer([""], True),
        Answer(["could not be read on"], False),
    )
    answers = iter([{"b": good, "c": bad}, ConfigError("/mnt: no space"), OSError("stale"), {"d": good, "e": silent}])

    def ask(nodes, folders, stopped):
        asked.append(nodes)
        answer = next(answers, {"e": silent})
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(admission_module, "ask", ask)
    monkeypatch.setattr(
        admission_module, "_occupy", lambda node, resources: occupied.append((node.id, resources["CPU"]))
    )
    listed = [node(k, f"10.0.0.{i}") | {"Resources": {"CPU": 4.0}} for i, k in enumerate("abcde")]
    monkeypatch.setattr(admission_module.ray, "nodes", lambda: listed)
    admission = Admission([A], ["a"], SimpleNamespace(say=lambda kind, text: said.append(text)))

    def settled(names: str) -> str:
        """The admitted nodes once no check is under way."""
        nodes = {k: Node(4, id=k) for k in names}
        while admission.of(nodes) is not None and admission._answer is not None:
            admission._answer.exception(10)
        return "".join(admission.of(nodes))

    assert settled("a") == "a"
    assert not asked
    assert settled("abc") == "ab"
    assert occupied == [("c", 4.0)]
    assert said == [complaint([A], {"10.0.0.2": ["is another folder on"]})]
    assert settled("abcde") == "abd"
    assert admission.barred == {"c", "e"}
    assert [name for name, _ in occupied] == ["c", "e"]
    assert said[1:3] == [f"nodes that joined could not be checked: {why}" for why in ("/mnt: no space", "stale")]
    assert said[3:] == [complaint([A], {"10.0.0.4": ["could not be read on"]})]
    assert asked[0] == ["b", "c"]
    assert not any({"b", "c"} & set(nodes) for nodes in asked[1:])
    assert ["d", "e"] in asked  # and e alone afterwards, since d had answered
    assert asked[-1] == ["e"]
    admission.close()


@pytest.mark.cluster
def test_a_node_with_another_file_system_at_the_same_path_is_named(cluster, tmp_path):
    """The node's processes live in a namespace of their own, where another file system is mounted over the folder."""
    import ray

    folder, both = tmp_path / "storage", tmp_path / "both"
    folder.mkdir()
    check_shared(ray.nodes(), [folder / "runs" / "a", both])  # head and node share everything
    assert not list(folder.iterdir())
    assert not both.exists()
    mount = 'mount -t tmpfs none "$0" && exec "$@"'
    if subprocess.run([*HIDDEN, mount, str(folder), "true"], capture_output=True).returncode:
        pytest.skip("this system allows no mounts in namespaces")
    start = [
        str(Path(sys.executable).parent / "ray"),
        "start",
        f"--address={cluster.address}",
        "--num-cpus=1",
        "--block",
    ]
    start += ["--labels=role=audit", f"--object-store-memory={80 * 2**20}"]
    process = subprocess.Popen(
        [*HIDDEN, mount, str(folder), *start], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    try:
        end = time.monotonic() + NODE_S
        while sum(n["Alive"] for n in ray.nodes()) < 3:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.5)
        with pytest.raises(ConfigError) as refused:
            check_shared(ray.nodes(), [folder / "runs" / "a", folder, both])
        text = str(refused.value)
        blind = next(n for n in ray.nodes() if n["Labels"].get("role") == "audit")
        assert text.startswith(
            f"the nodes do not share their storage: {folder}/runs/a does not exist on {name_of(blind)}; {folder} is another folder on "
            f"{name_of(blind)}. To run on them, mount"
        )
        assert "(train)" not in text
        check_that_it_gets_no_work(folder, blind["NodeID"], name_of(blind))
        listed = ray.nodes()
        cluster.kill(cluster.nodes[0])
        check_shared(listed, [both])  # Ray does not know yet that the node is dead
        assert not list(folder.iterdir())
        assert not both.exists()
    finally:
        process.terminate()
        process.wait(30)
