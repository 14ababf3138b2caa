"""The schema of KubeRay's RayJob, reduced to the fields that docs/cluster/kuberay.yaml sets.

KubeRay's whole definition has 1.4 MB, most of it Kubernetes' pods. To check the manifest against it, and to write the reduced
schema anew after a change of the manifest, get it from the release that is to be supported and run, in the repository's root,

    python tests/rayjob.py ray.io_rayjobs.yaml VERSION

with helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml of https://github.com/ray-project/kuberay.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import yaml

ROOT = Path(__file__).parent.parent
MANIFEST, REDUCED = ROOT / "docs" / "cluster" / "kuberay.yaml", Path(__file__).with_name("rayjob_schema.json")
KEPT = (
    "type",
    "format",
    "enum",
    "pattern",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "anyOf",
    "default",
)


def documents() -> dict[str, Any]:
    """The manifest's documents by kind."""
    return {d["kind"]: d for d in yaml.safe_load_all(MANIFEST.read_text())}


def strict(schema: Any) -> Any:
    """The schema of a resource as an API server applies it: fields that it does not name are errors."""
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items() if key not in ("properties", "items")}
    if "items" in schema:
        closed["items"] = strict(schema["items"])
    if "properties" in schema:
        closed["properties"] = {name: strict(member) for name, member in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            closed.setdefault("additionalProperties", False)
    return closed


def reduced(schema: dict[str, Any], values: list[Any]) -> dict[str, Any]:
    """The part of a schema that says something about the fields of some values."""
    small = {key: schema[key] for key in KEPT if key in schema}
    if "items" in schema:
        members = [member for value in values for member in value]
        small["items"] = reduced(schema["items"], members) if members else {}
    if isinstance(schema.get("additionalProperties"), dict):
        small["additionalProperties"] = {k: v for k, v in schema["additionalProperties"].items() if k in KEPT}
    if "properties" in schema:
        used = [name for name in schema["properties"] if any(name in value for value in values)]
        small["properties"] = {
            name: reduced(schema["properties"][name], [value[name] for value in values if name in value])
            for name in used
        }
        small["required"] = list(schema.get("required", []))
    return small


def main(definition: str, version: str) -> None:
    """Checks the manifest against the whole definition, and writes the reduced schema."""
    crd = yaml.load(Path(definition).read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    versions = {v["name"]: v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"]}
    job = documents()["RayJob"]
    schema = versions[job["apiVersion"].partition("/")[2]]
    jsonschema.validate(job, strict(schema))
    sys.stdout.write(f"{MANIFEST.relative_to(ROOT)}: valid for KubeRay {version}\n")
    content = {"source": f"ray.io_rayjobs.yaml of KubeRay {version}", "schema": reduced(schema, [job])}
    REDUCED.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
