"""Imports a Flower app's components, for one run only: the next app may bring the same names."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedsim._flower import has_main, is_legacy_client, is_legacy_server
from fedsim.apps.project import APP, FILE, Project
from fedsim.errors import Problem, ScenarioError

NEVER_HIDDEN = {"fedsim", "flwr", *sys.stdlib_module_names}


@contextmanager
def imported(project: Project) -> Iterator[tuple[ServerApp, ClientApp]]:
    """Imports the app anew, and forgets its modules at the end of the block.

    Inside the block the app's folder is first on the path. Raises ScenarioError with all that is
    wrong with either component, those for Flower's former API included.
    """
    with own_modules(project.folder):
        problems: list[Problem] = []
        server = _component(project, "serverapp", ServerApp, problems)
        client = _component(project, "clientapp", ClientApp, problems)
        if isinstance(server, ServerApp):
            problems += _server_problems(project, server)
        if isinstance(client, ClientApp):
            problems += _client_problems(project, client)
        if problems:
            raise ScenarioError(problems)
        yield server, client


@contextmanager
def own_modules(folder: Path) -> Iterator[None]:
    """Lets a folder's modules be imported from it, and puts others of the same names back after.

    Python keeps modules by name, so that a second app whose package has the name of the first's
    would get the first's again.
    """
    own = {path.stem for path in folder.glob("*.py")}
    own |= {path.parent.name for path in folder.glob("*/*.py")}
    own |= {path.parent.parent.name for path in folder.glob("*/*/*.py")}
    own -= NEVER_HIDDEN
    hidden = {name: sys.modules[name] for name in _of(own)}
    for name in hidden:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))
        for name in _of(own):
            del sys.modules[name]
        sys.modules.update(hidden)


def _of(packages: set[str]) -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] in packages]


def _component(project: Project, kind: str, wanted: type, problems: list[Problem]) -> Any:
    reference: str = getattr(project, kind)
    module, _, attribute = reference.partition(":")
    field = f"{kind} {reference!r}"

    def wrong(message: str, hint: str = "") -> None:
        problems.append(Problem(field, message, hint=hint, file=str(project.folder / FILE)))

    if module.partition(".")[0] in NEVER_HIDDEN:
        wrong(f"an app's package cannot be called {module.partition('.')[0]}: Python has another")
        return None
    try:
        found: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        hint = ""
        if isinstance(error, ImportError) and "flwr." in str(error):
            hint = f"The app is for another Flower than {version('flwr')}, which is installed"
        elif isinstance(error, ModuleNotFoundError):
            hint = f"Install what the app needs (pip install -e {project.folder})"
        where = where_of(error, project.folder)
        wrong(f"cannot be imported: {type(error).__name__}: {error}{where}", hint)
        return None
    for part in attribute.split("."):
        if not hasattr(found, part):
            wrong(f"module {module} has no {attribute}", f"{APP}.components names it")
            return None
        found = getattr(found, part)
    if not isinstance(found, wanted):
        wrong(f"must be a {wanted.__name__}, not a {type(found).__name__}")
        return None
    return found


def _server_problems(project: Project, app: ServerApp) -> Iterator[Problem]:
    field, file = f"serverapp {project.serverapp!r}", str(project.folder / FILE)
    if is_legacy_server(app):
        yield Problem(
            field,
            "is built from a server_fn, config or strategy of flwr.server, Flower's former API,"
            " which does not run here",
            hint="Write @app.main() with a strategy of flwr.serverapp.strategy and strategy.start",
            file=file,
        )
    elif not has_main(app):
        yield Problem(field, "has no function under @app.main()", file=file)


def _client_problems(project: Project, app: ClientApp) -> Iterator[Problem]:
    field, file = f"clientapp {project.clientapp!r}", str(project.folder / FILE)
    if is_legacy_client(app):
        yield Problem(
            field,
            "is built from a client_fn (NumPyClient, Client), Flower's former API, which does not"
            " run here",
            hint="Write functions under @app.train() and @app.evaluate() that take a Message and"
            " return one",
            file=file,
        )


def where_of(error: BaseException, folder: Path) -> str:
    """Returns " (file.py, line 3)", the innermost place inside `folder` that the error came from.

    Empty if it came from elsewhere.
    """
    inside = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(folder)
    ]
    if not inside:
        return ""
    return f" ({Path(inside[-1].filename).relative_to(folder)}, line {inside[-1].lineno})"
