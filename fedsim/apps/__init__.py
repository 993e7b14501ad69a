"""Flower apps as they are: a folder with a pyproject.toml, run on the engine in this process."""

from fedsim.apps.plan import AppSpec, prepare
from fedsim.apps.run import run_app, run_apps

__all__ = ["AppSpec", "prepare", "run_app", "run_apps"]
