"""The part of kustomize that deploy/kubernetes uses, for machines without it.

A kustomization with a field that is not known here is an error, so that nothing goes by untested.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Resource = dict[str, Any]

FIELDS = {"apiVersion", "kind", "namespace", "labels", "resources", "patches", "configMapGenerator"}
# The lists whose items are told apart by one of their keys when they are merged.
MERGE_KEYS = {"containers": "name", "initContainers": "name", "volumes": "name", "env": "name"}


def build(folder: Path) -> list[Resource]:
    """Return the resources that `kubectl apply --kustomize FOLDER` would send."""
    (kustomization,) = _read(folder / "kustomization.yaml")
    unknown = kustomization.keys() - FIELDS
    assert not unknown, f"{folder.name}: tests/deploy/kustomize.py does not know {unknown}"
    resources = [resource for name in kustomization["resources"] for resource in _resources(folder / name)]
    for patch in kustomization.get("patches", []):
        for change in _read(folder / patch["path"]):
            (at,) = [index for index, resource in enumerate(resources) if _id(resource) == _id(change)]
            resources[at] = _merged(resources[at], change)
    for generator in kustomization.get("configMapGenerator", []):
        resources = _with_config_map(resources, folder, generator)
    for resource in resources:
        if "namespace" in kustomization:
            resource["metadata"]["namespace"] = kustomization["namespace"]
        for labels in kustomization.get("labels", []):
            resource["metadata"].setdefault("labels", {}).update(labels["pairs"])
    return resources


def _resources(path: Path) -> list[Resource]:
    return build(path) if path.is_dir() else list(_read(path))


def _read(path: Path) -> Iterator[Resource]:
    # An anchor and its aliases are one object in Python, and a change of one would change all.
    yield from (json.loads(json.dumps(item)) for item in yaml.safe_load_all(path.read_text("utf-8")))


def _id(resource: Resource) -> tuple[str, str]:
    return resource["kind"], resource["metadata"]["name"]


def _merged(before: Any, change: Any, key: str = "") -> Any:
    """Return a value after a strategic merge patch."""
    if isinstance(before, dict) and isinstance(change, dict):
        changed = {name: _merged(before.get(name), value, name) for name, value in change.items()}
        return before | changed
    if isinstance(before, list) and key in MERGE_KEYS:
        name = MERGE_KEYS[key]
        known = {item[name]: item for item in before}
        return list((known | {item[name]: _merged(known.get(item[name]), item) for item in change}).values())
    return change


def _with_config_map(resources: list[Resource], folder: Path, generator: Resource) -> list[Resource]:
    """Add a ConfigMap whose name has a digest of its content, and name it where it is used."""
    files = {name: (folder / name).read_text("utf-8") for name in generator["files"]}
    digest = hashlib.sha256(str(files).encode()).hexdigest()[:10]
    name = f"{generator['name']}-{digest}"
    config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": files}
    return [_renamed(resource, generator["name"], name) for resource in resources] + [config_map]


def _renamed(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {
            key: {**item, "name": new}
            if key == "configMap" and item.get("name") == old
            else _renamed(item, old, new)
            for key, item in value.items()
        }
    return [_renamed(item, old, new) for item in value] if isinstance(value, list) else value
