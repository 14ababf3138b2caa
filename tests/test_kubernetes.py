"""The RayJob of docs/cluster/kuberay.yaml: against KubeRay's schema, and the plan that Ray's autoscaler makes of it."""

from __future__ import annotations

import copy
import json
import shlex

import jsonschema
import pytest
import yaml
from rayjob import REDUCED, documents, strict

from raysweep.config.reader import load
from raysweep.engine.arrival import expected_nodes as expected_by
from raysweep.engine.expectation import expected_nodes
from raysweep.engine.resources import Node, make_plan

JOB = documents()["RayJob"]
SCHEMA = strict(json.loads(REDUCED.read_text())["schema"])
CLUSTER = JOB["spec"]["rayClusterSpec"]
COMMAND = shlex.split(JOB["spec"]["entrypoint"])


def test_the_manifest_follows_the_schema():
    jsonschema.validate(JOB, SCHEMA)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((), {"backofLimit": 3}, "'backofLimit' was unexpected"),
        (("rayClusterSpec", "authOptions"), {"mode": "tokens"}, "'tokens' is not one of"),
        (("rayClusterSpec", "workerGroupSpecs", 0), {"maxReplicas": "3"}, "'3' is not of type 'integer'"),
        (("rayClusterSpec", "workerGroupSpecs", 0, "resources"), {"trial_slot": 64}, "64 is not of type 'string'"),
        (("rayClusterSpec", "headGroupSpec", "template", "spec"), {"container": []}, "'container' was unexpected"),
    ],
)
def test_the_schema_notices_mistakes(path, value, message):
    job = copy.deepcopy(JOB)
    level = job["spec"]
    for key in path:
        level = level[key]
    level |= value
    with pytest.raises(jsonschema.ValidationError, match=message):
        jsonschema.validate(job, SCHEMA)


def test_the_plan_of_the_manifest():
    """With the node types that Ray's autoscaler derives from the pods."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    cluster = {"spec": CLUSTER, "metadata": {"name": "raysweep", "namespace": "default"}}
    launcher = _derive_autoscaling_config_from_ray_cr(cluster)
    nodes = expected_nodes(launcher, "kuberay.yaml")
    assert nodes == [Node(180, 8, "train")] * 3 + [Node(180, 8, "audit")]
    assert expected_by(load(None, COMMAND[6:])) == nodes  # the job asks for what the groups allow
    plan = make_plan(nodes, load(None))
    assert (plan.slots, plan.auditors) == (24, 8)
    types = launcher["available_node_types"]
    assert {types[name]["resources"]["trial_slot"] for name in ("train", "audit")} == {64}
    assert not {"GPU", "trial_slot"} & set(types[launcher["head_node_type"]]["resources"])


def test_pods_share_the_storage():
    groups = [CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]]
    claim = documents()["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in groups:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["volumeMounts"] == [{"name": pod["volumes"][0]["name"], "mountPath": "/shared"}]
        assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}
        assert {"name": "RAYSWEEP_CACHE", "value": "/shared/raysweep/cache"} in container["env"]
    program, settings = COMMAND[:4], COMMAND[4:]
    assert program == ["python", "-m", "raysweep", "run"]
    assert settings[:2] == ["/shared/raysweep/sweep.yaml", "storage=/shared/raysweep/runs"]
    assert yaml.safe_load(JOB["spec"]["runtimeEnvYAML"]) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}}


def test_an_evicted_pod_drains_within_its_grace_period():
    for group in CLUSTER["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        *shell, command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert shell == ["bash", "-c"]
        assert "ray drain-node" in command
        assert pod["terminationGracePeriodSeconds"] > 110
