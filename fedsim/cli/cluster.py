"""The commands about Ray clusters: up, status, down."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsim.cli import options

if TYPE_CHECKING:
    from rich.console import Console

    from fedsim.cluster.state import Cluster, Local

app = typer.Typer(
    help="Start, look at and end a Ray cluster for `--engine ray`.", no_args_is_help=True
)

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Launcher files: ask no questions.")]


@app.command()
def up(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE.yaml]",
            help="A file of Ray's launcher, such as deploy/ray/onprem.yaml; this machine alone if"
            " left out.",
            show_default=False,
        ),
    ] = None,
    cpus: Annotated[
        int | None,
        typer.Option("--cpus", metavar="N", min=0, help="CPUs to use.", show_default="all"),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", metavar="N", min=0, help="GPUs to use.", show_default="all"),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            "--port",
            metavar="P",
            min=0,
            max=65535,
            help="Port of Ray's control store; 0 for any that is free.",
            show_default="6379",
        ),
    ] = None,
    node_ip: Annotated[
        str | None,
        typer.Option(
            "--node-ip",
            metavar="ADDRESS",
            help="Address at which other machines reach this one.",
            show_default="127.0.0.1, nobody else",
        ),
    ] = None,
    object_store: Annotated[
        int | None,
        typer.Option(
            "--object-store",
            metavar="MIB",
            help="Memory for what nodes send each other.",
            show_default="1024, at most 30% of the memory",
        ),
    ] = None,
    yes: Yes = False,
) -> None:
    """Start a Ray cluster that wants a token: on this machine, or from a launcher file."""
    from fedsim.cli.output import console
    from fedsim.errors import UserError

    to = console()
    given = {
        "--cpus": cpus,
        "--gpus": gpus,
        "--port": port,
        "--node-ip": node_ip,
        "--object-store": object_store,
    }
    if file is not None:
        if named := [name for name, value in given.items() if value is not None]:
            raise UserError(f"{', '.join(named)}: {file} says what its machines have; edit it")
        from fedsim.cluster import launcher

        launched = launcher.up(file, yes)
        _print_launched(launched.name, file, to)
        return
    from fedsim.cluster import local

    asked = local.Head(
        cpus=cpus,
        gpus=gpus,
        host=node_ip or local.Head.host,
        port=local.Head.port if port is None else port,
        object_store=None if object_store is None else object_store * local.MIB,
    )
    _print_local(local.start(asked), to)


@app.command()
def status(
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="HOST:PORT|auto",
            help="The cluster to ask; the one that `up` started if left out.",
            show_default=False,
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show a cluster: nodes, resources, address, dashboard, version."""
    from fedsim.cli.output import console, print_json
    from fedsim.cluster import connect, launcher, probe, state
    from fedsim.cluster.installed import ray_version
    from fedsim.errors import UserError

    ray_version()
    cluster = state.read() if address is None else None
    if address is None and cluster is None:
        raise UserError("no cluster is up; `fedsim cluster up` starts one on this machine")
    if isinstance(cluster, state.Launched):
        document = launcher.ask(cluster)
    else:
        at = connect.resolve(cluster.address if cluster else address or connect.AUTO)
        document = probe.ask(at, connect.environment(at))
        document |= _remembered(state.read(), document["address"])
    if as_json:
        print_json(document)
    else:
        _print_status(document, console())


@app.command()
def down(
    keep_logs: Annotated[
        bool, typer.Option("--keep-logs", help="Leave what Ray wrote, under /tmp.")
    ] = False,
    yes: Yes = False,
) -> None:
    """End the cluster that `up` started, and no other process."""
    from fedsim.cli.output import console
    from fedsim.cluster import launcher, local, state
    from fedsim.cluster.installed import ray_version

    to = console()
    match state.read():
        case None:
            to.print("There is no cluster that `fedsim cluster up` started.")
        case state.Launched() as launched:
            ray_version()
            launcher.down(launched, yes)
            to.print(f"The cluster of {launched.file} is gone.", markup=False)
        case state.Local() as found:
            ray_version()
            with state.lock():
                ended = local.stop(found, keep_logs)
            if not ended:
                to.print(f"The cluster at {found.address} had died; tidied up.")
                return
            kept = f" Ray's logs are in {found.folder}." if keep_logs else ""
            to.print(f"Ended {ended} processes of the cluster at {found.address}.{kept}")


def _remembered(cluster: Cluster | None, address: str) -> dict[str, Any]:
    """Returns what only the machine that started a cluster knows of it."""
    from fedsim.cluster.state import Local

    if not isinstance(cluster, Local) or cluster.address != address:
        return {}
    return {"token": str(cluster.token), "logs": str(_logs(cluster)), "started_here": True}


def _logs(cluster: Local) -> Path:
    from fedsim.cluster.local import RAYS

    return cluster.folder / RAYS / "session_latest" / "logs"


def _print_local(cluster: Local, to: Console) -> None:
    where = "this machine alone" if cluster.loopback else "whoever has the token, unencrypted"
    to.print(f"Ray {cluster.ray} is up at {cluster.address}, for {where}.")
    _print_facts(
        {
            "objects": f"{cluster.object_store // 2**20} MiB of memory",
            "token": cluster.token,
            "logs": _logs(cluster),
        },
        to,
    )
    to.print("Try", style="bold")
    to.print("  fedsim run mine.yaml --engine ray --address auto")
    to.print("  fedsim cluster status")
    to.print("  fedsim cluster down")


def _print_launched(name: str, file: Path, to: Console) -> None:
    to.print(f"The cluster {name} is up.", markup=False)
    to.print("Try", style="bold")
    for line in (
        "fedsim cluster status",
        f"ray rsync-up {file} mine.yaml mine.yaml",
        f'ray exec {file} "fedsim run mine.yaml --engine ray --address auto"',
        f"ray dashboard {file}",
        "fedsim cluster down",
    ):
        to.print(f"  {line}", markup=False, soft_wrap=True)


def _print_status(document: Mapping[str, Any], to: Console) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    total, free = document["total"], document["free"]
    _print_facts(
        {
            "address": document["address"],
            "ray": f"{document['ray']}, Python {document['python']}",
            "CPUs": f"{free['cpus']:g} of {total['cpus']:g} free",
            "GPUs": f"{free['gpus']:g} of {total['gpus']:g} free",
            "memory": f"{free['memory_mib']} of {total['memory_mib']} MiB free",
            "objects": f"{free['object_store_mib']} of {total['object_store_mib']} MiB free",
            "dashboard": document["dashboard"] or "none: pip install 'ray[default]' brings it",
            "token": document.get("token"),
            "logs": document.get("logs"),
        },
        to,
    )
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for name in ("node", "host", "CPUs", "GPUs", "objects MiB", "state"):
        table.add_column(name, justify="left" if name in ("node", "host", "state") else "right")
    for node in document["nodes"]:
        table.add_row(
            node["id"][:12],
            node["host"],
            f"{node['cpus']:g}",
            f"{node['gpus']:g}",
            str(node["object_store_mib"]),
            "alive" if node["alive"] else "dead",
        )
    to.print(table)


def _print_facts(facts: Mapping[str, object], to: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        if value is not None:
            table.add_row(f"[bold]  {name}[/]", Text(str(value), overflow="fold"))
    to.print(table)
