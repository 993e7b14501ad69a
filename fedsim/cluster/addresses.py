"""Addresses of clusters, HOST:PORT: what is one, what is free, what answers."""

from __future__ import annotations

import errno
import ipaddress
import socket

from fedsim.errors import UserError

REACH = 5.0
"""Seconds in which a host must answer."""


def parse(address: str) -> tuple[str, int]:
    """Returns host and port of HOST:PORT ([HOST]:PORT for IPv6); raises UserError for others."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16 or "/" in host:
        raise UserError(
            f"{address!r} is not the address of a Ray cluster; write HOST:PORT, such as"
            " 10.0.0.10:6379, or auto"
        )
    return host, int(port)


def join(host: str, port: int) -> str:
    """Returns HOST:PORT, the inverse of `parse`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Returns whether Ray, asked for a node at `host`, can be kept from all other machines.

    Only 127.0.0.1: it takes other loopback addresses for a network's, and listens everywhere.
    """
    return host == "127.0.0.1"


def check_host(host: str) -> None:
    """Raises UserError if `host` is no IP address of this machine."""
    try:
        with socket.socket(_family(host)) as probe:
            probe.bind((host, 0))
        if host == "::1":
            raise UserError("Ray knows no IPv6 loopback; --node-ip 127.0.0.1 is this machine alone")
    except ValueError:
        raise UserError(f"--node-ip takes an IP address; {host!r} is none") from None
    except OSError as error:
        raise UserError(
            f"{host} is no address of this machine ({error.strerror}); --node-ip takes one of its"
            " network interfaces', or leave it out for this machine alone"
        ) from None


def free_port(host: str, port: int) -> int:
    """Returns `port`, or a free one for 0; raises UserError if it is taken."""
    try:
        with socket.socket(_family(host)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        why = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
        raise UserError(
            f"port {port} of {host} {why}; choose another with --port, 0 for any that is free"
        ) from None


def reach(address: str) -> None:
    """Raises UserError if nothing answers at HOST:PORT."""
    host, port = parse(address)
    try:
        socket.create_connection((host, port), REACH).close()
    except OSError as error:
        why = error.strerror or str(error)
        raise UserError(
            f"no Ray cluster answers at {address} ({why}); `fedsim cluster status` shows the one"
            " that was started here"
        ) from None


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
