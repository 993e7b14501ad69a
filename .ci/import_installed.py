"""Imports every module of the installed fedsim and checks what else the wheel installed.

Run it with the environment's own Python and `-I`, so that a source tree cannot stand in for the
wheel. Only the core dependencies are there: a module that needs an extra imports it inside the
functions that use it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import sys

import fedsim

if "site-packages" not in fedsim.__file__:
    sys.exit(f"not the installed package: {fedsim.__file__}")

modules = [module.name for module in pkgutil.walk_packages(fedsim.__path__, "fedsim.")]
for name in modules:
    importlib.import_module(name)

for needed in ("fedsim.strategies", "fedsim.clients", "fedsim.server"):
    if needed not in modules:
        sys.exit(f"{needed} is missing from the wheel")

files = importlib.metadata.files("fedsim-fl") or []
top_level = {file.parts[0] for file in files} - {".."}
strangers = {name for name in top_level if name != "fedsim" and not name.endswith(".dist-info")}
if strangers:
    sys.exit(f"the wheel installs more than fedsim: {', '.join(sorted(strangers))}")

entries = [
    entry
    for entry in importlib.metadata.distribution("fedsim-fl").entry_points
    if entry.group == "console_scripts" or entry.group.startswith("fedsim.")
]
for entry in entries:
    entry.load()

print(f"imported {len(modules)} modules and {len(entries)} entry points of the installed wheel")
