"""cluster.yaml as Ray and EC2 read it: schema, keys, what nodes install and start; nothing is sent anywhere."""

from __future__ import annotations

import copy
import http.server
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tiny import ROOT

LAUNCHER = yaml.safe_load((ROOT / "cluster.yaml").read_text())
TYPES = LAUNCHER["available_node_types"]
REGION = "us-east-1"


def test_ray_accepts_the_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(LAUNCHER)))


def test_roles_and_resources_of_the_nodes():
    head = TYPES[LAUNCHER["head_node_type"]]
    assert set(head["resources"]) == {"CPU"}  # no GPUs and no trial functions
    for name, kind in TYPES.items():
        if kind is not head:
            role, _, variant = name.partition("-")
            assert kind["labels"] == {"role": role}
            assert kind["resources"] == {"CPU": 192, "GPU": 8, "trial_slot": 64}
            assert kind.get("min_workers", 0) == 0  # nodes come when a run asks for them
            assert (kind["max_workers"] > 0) == (not variant)
    assert sum(kind.get("max_workers", 0) for kind in TYPES.values()) == LAUNCHER["max_workers"]


class Seen(dict):
    """A mapping that remembers which of its keys were read."""

    keys_read: set[str] = set()

    def get(self, key, default=None):
        self.keys_read.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.keys_read.add(key)
        return super().__getitem__(key)


@pytest.fixture
def ec2(monkeypatch, tmp_path):
    """Calls to AWS, in order: (operation, arguments). Each is checked against the model of its service and answered from here."""
    from botocore.client import BaseClient
    from botocore.validate import ParamValidator

    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps its SSH key in ~/.ssh
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "none")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "none")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    calls = []

    def answer(client, operation, arguments):
        shape = client.meta.service_model.operation_model(operation).input_shape
        report = ParamValidator().validate(arguments, shape)
        assert not report.has_errors(), report.generate_report()
        require_known_values(arguments, shape)
        calls.append((operation, arguments))
        listed = next(iter(arguments.get("Filters", [])), {"Values": []})["Values"]
        zone = LAUNCHER["provider"]["availability_zone"]
        subnets = listed or ["subnet"]
        instance = {"InstanceId": "i-1", "State": {"Code": 0, "Name": "pending"}, "StateReason": {"Message": ""}}
        profile = {"Arn": "arn:aws:iam::1:instance-profile/p", "InstanceProfileName": "p", "Roles": [{"RoleName": "r"}]}
        return {
            "DescribeSubnets": {
                "Subnets": [
                    {"SubnetId": s, "State": "available", "AvailabilityZone": zone, "VpcId": "v"} for s in subnets
                ]
            },
            "DescribeSecurityGroups": {"SecurityGroups": [{"GroupId": g, "VpcId": "v"} for g in listed]},
            "DescribeKeyPairs": {"KeyPairs": []},
            "CreateKeyPair": {"KeyName": arguments.get("KeyName"), "KeyMaterial": "key"},
            "GetInstanceProfile": {"InstanceProfile": profile},
            "RunInstances": {"Instances": [instance] * arguments.get("MaxCount", 0)},
        }[operation]

    monkeypatch.setattr(BaseClient, "_make_api_call", answer)
    return calls


def require_known_values(value, shape):
    """Asserts that each value of an argument is one that the service's model lists, where it lists any."""
    if shape.type_name == "structure":
        for key, member in value.items():
            require_known_values(member, shape.members[key])
    elif shape.type_name == "list":
        for member in value:
            require_known_values(member, shape.member)
    elif getattr(shape, "enum", None):
        assert value in shape.enum, f"{shape.name}: {value}"


def test_every_key_reaches_ec2(ec2):
    """Ray's own AWS provider launches a node of each type."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config

    launcher = copy.deepcopy(LAUNCHER)
    launcher["provider"] = Seen(launcher["provider"])
    Seen.keys_read = set()
    ready = AWSNodeProvider.bootstrap_config(prepare_config(launcher))
    provider = AWSNodeProvider(ready["provider"], ready["cluster_name"])
    assert Seen.keys_read - {"type"} >= set(LAUNCHER["provider"]) - {"type"}
    for name, kind in TYPES.items():
        ec2.clear()
        created = provider.create_node(copy.deepcopy(ready["available_node_types"][name]["node_config"]), {}, 2)
        ((operation, sent),) = ec2
        assert (operation, sent["MaxCount"], list(created)) == ("RunInstances", 2, ["i-1"])
        ours = dict(kind["node_config"])
        if name == LAUNCHER["head_node_type"]:
            assert [sent["SubnetId"]] == ours.pop("SubnetIds")
        else:
            assert not {"SubnetId", "SubnetIds", "SecurityGroupIds"} & set(sent)  # EC2 takes them per interface
        assert {key: sent[key] for key in ours} == ours
        assert sent["KeyName"].startswith("ray-autoscaler")


@pytest.mark.parametrize(
    ("key", "value"), [("InstanceTyp", "p5.48xlarge"), ("InstanceMarketOptions", {"MarketType": "spott"})]
)
def test_a_wrong_key_would_be_noticed(ec2, key, value):
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    provider = AWSNodeProvider({"region": REGION, "cache_stopped_nodes": False}, "test")
    with pytest.raises(AssertionError, match=key if key == "InstanceTyp" else "spott"):
        provider.create_node({"SubnetIds": ["s"], key: value}, {}, 1)


def test_network_interfaces_and_markets():
    """One address and an EFA on each of a p5.48xlarge's 32 network cards; spot and Capacity Block differ from it in the market."""
    usual = TYPES["train"]["node_config"]
    assert usual["InstanceType"] == "p5.48xlarge"
    assert set(usual["Placement"]) == {"GroupName"}
    first, *efa = usual["NetworkInterfaces"]
    assert (first["NetworkCardIndex"], first["DeviceIndex"], first["InterfaceType"]) == (0, 0, "interface")
    assert {n["InterfaceType"] for n in efa} == {"efa-only"}
    assert [(n["NetworkCardIndex"], n["DeviceIndex"]) for n in efa] == [(0, 1), *((i, 0) for i in range(1, 32))]
    assert all(n["SubnetId"] == first["SubnetId"] and n["Groups"] == first["Groups"] for n in efa)
    assert TYPES["audit"]["node_config"] == usual
    assert TYPES["train-spot"]["node_config"] == usual | {"InstanceMarketOptions": {"MarketType": "spot"}}
    block = TYPES["train-block"]["node_config"]
    assert block["InstanceMarketOptions"] == {"MarketType": "capacity-block"}
    assert "CapacityReservationId" in block["CapacityReservationSpecification"]["CapacityReservationTarget"]
    assert TYPES["audit-block"]["node_config"] == block


def test_placeholders_are_whole_values():
    """A comma in one would split it in two."""

    def leaves(value):
        if isinstance(value, dict | list):
            for member in value.values() if isinstance(value, dict) else value:
                yield from leaves(member)
        else:
            yield str(value)

    texts = list(leaves([kind["node_config"] for kind in TYPES.values()]))
    assert all(text.count("<") == text.count(">") for text in texts)
    assert sum(text.startswith("<") for text in texts) > 5


def test_nodes_install_what_the_project_needs():
    """The wheel of this checkout, and so all that pyproject.toml names, in the versions of the environment that submits jobs."""
    dist, install = "/home/ubuntu/raysweep", LAUNCHER["setup_commands"][-1]
    assert LAUNCHER["file_mounts"][dist] == "dist"
    wheels = f'"$(ls {dist}/raysweep-*.whl)[aws]"'
    assert install == f"/home/ubuntu/env/bin/pip install -c {dist}/constraints.txt {wheels}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    command = "pip list --format=freeze --exclude-editable | sed 's/+.*//'"
    making = f"pip wheel --no-deps -w dist . && {command} > dist/constraints.txt"
    assert all(making in (ROOT / name).read_text() for name in ("cluster.yaml", "docs/cluster.md"))
    here = f"{shlex.quote(sys.executable)} -m {command}"
    listed = subprocess.run(["bash", "-c", here], capture_output=True, text=True, check=True).stdout
    versions = {canonicalize_name(n): v for n, _, v in (line.partition("==") for line in listed.split())}
    assert not any("+" in version for version in versions.values())  # builds for a CPU alone have such versions
    for dependency in project["dependencies"] + project["optional-dependencies"]["aws"]:
        wanted = Requirement(dependency)
        assert wanted.specifier.contains(versions[canonicalize_name(wanted.name)], prereleases=True), dependency


def test_ray_is_started_with_the_token_and_by_the_environment():
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        start = LAUNCHER[key][-1]
        before, _, _ = start.partition("ray start")
        assert "export PATH=/home/ubuntu/env/bin:$PATH " in before  # jobs run by its Python
        assert "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/home/ubuntu/.raysweep-token" in before
        assert "RAYSWEEP_CACHE=/shared/" in before
    assert "--dashboard-host=127.0.0.1" in LAUNCHER["head_start_ray_commands"][-1]
    assert "/home/ubuntu/.raysweep-token" in LAUNCHER["file_mounts"]


@pytest.mark.parametrize("key", [k for k in LAUNCHER if k.endswith("commands")])
def test_commands_are_valid_shell(key):
    for command in LAUNCHER[key]:
        subprocess.run(["bash", "-n", "-c", re.sub(r"<[^>]*>", "value", command)], check=True)


def test_setup_stops_without_the_shared_storage():
    check = next(c for c in LAUNCHER["setup_commands"] if c.startswith("mountpoint"))
    outcome = subprocess.run(["bash", "-c", check], capture_output=True, text=True, check=False)
    assert (outcome.returncode, outcome.stdout) == (1, "")
    assert "/shared is not mounted" in outcome.stderr
    subprocess.run(["bash", "-c", check.replace("/shared", "/", 1)], check=True)


def test_a_spot_node_is_drained_on_notice(tmp_path):
    """By the script that workers start, with EC2's metadata service played by a server that announces at its third answer."""
    script = ROOT / LAUNCHER["file_mounts"]["/home/ubuntu/drain_on_notice.sh"]
    requests: list[str] = []

    class Metadata(http.server.BaseHTTPRequestHandler):
        def respond(self, status: int, body: bytes) -> None:
            requests.append(f"{self.command} {self.path} {self.headers.get('X-aws-ec2-metadata-token', '')}".strip())
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_PUT(self) -> None:
            self.respond(200, b"secret")

        def do_GET(self) -> None:
            announced = sum(r.startswith("GET") for r in requests) >= 2
            self.respond(200 if announced else 404, b'{"action": "terminate"}' if announced else b"")

        def log_message(self, *_: object) -> None:
            pass

    for name, body in (("sleep", "exit 0"), ("ray", f'echo "$@" >> {tmp_path}/drained')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    server = http.server.HTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        environment = {
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "RAY_HEAD_IP": "10.0.0.1",
            "EC2_METADATA": f"http://127.0.0.1:{server.server_port}",
        }
        subprocess.run(["bash", script], env=environment, check=True, timeout=30, capture_output=True)
    finally:
        server.shutdown()
        server.server_close()
    assert requests == ["PUT /latest/api/token", "GET /latest/meta-data/spot/instance-action secret"] * 3
    (drained,) = Path(tmp_path / "drained").read_text().splitlines()
    assert drained.startswith("drain-node --address 10.0.0.1:6379 --reason DRAIN_NODE_REASON_PREEMPTION")
