"""A driver in a process of its own: python -P tests/cluster/driver.py ADDRESS [MODULE_PATH…].

Joins the cluster, runs one task on every node and writes one line of JSON: the CPUs, and for every
node the id that the task saw, and where the shipped modules were imported from.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def where(names: list[str]) -> tuple[str, dict[str, str]]:
    """Returns the node that this runs on, and the files of modules by name."""
    return ray.get_runtime_context().get_node_id(), {name: _place(name) for name in names}


def _place(name: str) -> str:
    """Returns a module's file; its folder if it is a package without an __init__.py."""
    module = importlib.import_module(name)
    return str(module.__file__ or next(iter(module.__path__)))


def main(address: str, paths: list[str]) -> None:
    """Runs a task on every living node."""
    modules = {"runtime_env": {"py_modules": paths}} if paths else {}
    context = ray.init(address=address, log_to_driver=False, logging_level="ERROR", **modules)
    task = ray.remote(num_cpus=0)(where)
    names = [Path(path).stem for path in paths]
    asked = {
        node["NodeID"]: task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(names)
        for node in ray.nodes()
        if node["Alive"]
    }
    answers = {node: ray.get(answer, timeout=60) for node, answer in asked.items()}
    document = {
        "address": context.address_info["gcs_address"],
        "cpus": ray.cluster_resources()["CPU"],
        "nodes": {node: {"ran_on": on, "files": files} for node, (on, files) in answers.items()},
    }
    sys.stdout.write(json.dumps(document) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
