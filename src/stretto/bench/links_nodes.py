"""Nodes on one machine: a network namespace each, joined by a bridge, every link of one rate.

What is limited is the rate of a node's interface, by a token bucket on both of its ends; latency
is that of the machine. Nothing is left in the machine's own namespace: the bridge has one too, and
deleting a namespace deletes the links that end in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stretto.errors import ConfigError, MissingDependency, RunError

#: Begins the names of our namespaces; then the process that made them, and what they are for.
PREFIX = "stretto-links"
_FOLDER = Path("/var/run/netns")
_INTERFACE = "eth0"
_NETWORK = "10.77.0.0/24"
_CLONE_NEWNET = 0x40000000
#: Bytes of a packet, and those that leave a rested bucket at once: a link that waited for the host
#: may catch up that much, which is also what each pass is given beyond the rate. Short packets
#: would cost cores that are no part of what is emulated, and overrun the kernel's queue of 1000.
_MTU = 60000
_BURST = 65536
#: Bytes that may queue: more than is ever under way, for a loss would measure TCP's recovery.
_LIMIT = 256 * 2**20
#: Bytes of a connection that may be under way from its start.
_WINDOW = 4 * 2**20
_TCP = {
    "tcp_congestion_control": "reno",
    "tcp_early_retrans": "0",
    "tcp_slow_start_after_idle": "0",
    "tcp_rmem": f"4096 {2 * _WINDOW} {4 * _WINDOW}",
    "tcp_wmem": f"4096 {_WINDOW} {4 * _WINDOW}",
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank lives: a namespace ("" for the machine's own), its interface and address."""

    namespace: str
    interface: str
    address: str

    def enter(self) -> None:
        """Move the calling thread there; threads that it starts later follow."""
        if not self.namespace:
            return
        with (_FOLDER / self.namespace).open("rb") as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
                code = ctypes.get_errno()
                raise RunError(f"cannot enter namespace {self.namespace}: {os.strerror(code)}")


#: Without namespaces: every rank on the loopback interface.
HERE = Place("", "lo", "127.0.0.1")


@dataclass(frozen=True, slots=True)
class Nodes:
    """Nodes, each with one interface; `hub` is the namespace in which the links meet."""

    places: tuple[Place, ...]
    hub: str

    def limit(self, rate: float | None) -> None:
        """Hold all interfaces to `rate` bytes/s each way; None: as fast as the machine."""
        for number, place in enumerate(self.places):
            for namespace, device in ((place.namespace, _INTERFACE), (self.hub, f"n{number}")):
                _bucket(namespace, device, rate)


def check_able() -> None:
    """Raise ConfigError unless namespaces can be made here, MissingDependency without iproute2."""
    missing = [name for name in ("ip", "tc") if not _tool(name)]
    if missing:
        raise MissingDependency(
            f"{' and '.join(missing)} not found: emulated nodes are made with iproute2\n"
            "  to fix: install it (Debian, Ubuntu: apt-get install iproute2)"
        )
    if os.geteuid() != 0:
        raise ConfigError(
            f"emulated nodes need root, this is user {os.geteuid()}\n"
            "  why: network namespaces and rates of links are made by root alone\n"
            "  to fix: run as root (sudo), in a container with the capabilities NET_ADMIN and "
            "SYS_ADMIN"
        )


@contextlib.contextmanager
def made(count: int) -> Iterator[Nodes]:
    """`count` nodes on free links, removed at the end whatever happens: SIGTERM, an interrupt.

    What an earlier process left behind when it was killed is removed first. Raises ConfigError
    without root, RunError when the kernel refuses.
    """
    check_able()
    _remove(_left_behind())
    name = f"{PREFIX}-{os.getpid()}"
    hub = f"{name}-hub"
    places = tuple(
        Place(f"{name}-{number}", _INTERFACE, f"10.77.0.{number + 1}") for number in range(count)
    )
    with _ending_on_sigterm():
        try:
            _ip("netns", "add", hub)
            _ip("-n", hub, "link", "add", "bridge", "type", "bridge")
            _ip("-n", hub, "link", "set", "bridge", "up")
            for number, place in enumerate(places):
                _join(place, hub, f"n{number}")
            yield Nodes(places, hub)
        finally:
            _remove([hub, *(place.namespace for place in places)])


def _join(place: Place, hub: str, port: str) -> None:
    """A namespace with an interface whose other end is a port of the bridge."""
    _ip("netns", "add", place.namespace)
    ends = ["link", "add", port, "netns", hub, "mtu", str(_MTU), "type", "veth"]
    _ip(*ends, "peer", "name", _INTERFACE, "netns", place.namespace, "mtu", str(_MTU))
    _ip("-n", hub, "link", "set", port, "master", "bridge")
    _ip("-n", hub, "link", "set", port, "up")
    _ip("-n", place.namespace, "address", "add", f"{place.address}/24", "dev", _INTERFACE)
    for device in (_INTERFACE, "lo"):
        _ip("-n", place.namespace, "link", "set", device, "up")
    _trusting(place)


def _trusting(place: Place) -> None:
    """Let TCP wait for acknowledgements that stand in a queue: nothing is ever lost here.

    A message may queue longer at a limited interface than TCP waits before it sends anew. Probes
    and timeouts would carry bytes twice, and shrink the window for the passes that follow; windows
    that start small would let links rest until a delayed acknowledgement comes.
    """
    route = ["route", "replace", _NETWORK, "dev", _INTERFACE, "proto", "kernel", "scope", "link"]
    window = str(_WINDOW // _MTU)
    route += ["src", place.address, "rto_min", "20s", "quickack", "1"]
    _ip("-n", place.namespace, *route, "initcwnd", window, "initrwnd", window)
    for name, value in _TCP.items():
        setting = f"echo {value} > /proc/sys/net/ipv4/{name}"
        # Without it, as in a container that may not write there, times are only less steady.
        _run("ip", "netns", "exec", place.namespace, "sh", "-c", setting, may_fail=True)


def _bucket(namespace: str, device: str, rate: float | None) -> None:
    where = ["dev", device, "root"]
    if rate is None:
        _run("tc", "-n", namespace, "qdisc", "del", *where, may_fail=True)
        return
    bucket = ["tbf", "rate", f"{round(8 * rate)}bit", "burst", f"{_BURST}b", "limit", str(_LIMIT)]
    _run("tc", "-n", namespace, "qdisc", "replace", *where, *bucket)


def _left_behind() -> list[str]:
    """Our namespaces whose process is gone."""
    if not _FOLDER.is_dir():
        return []
    found = []
    for file in _FOLDER.glob(f"{PREFIX}-*"):
        pid = file.name.removeprefix(f"{PREFIX}-").partition("-")[0]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            found.append(file.name)
    return found


def _remove(names: Sequence[str]) -> None:
    for name in names:
        if (_FOLDER / name).exists():
            _run("ip", "netns", "delete", name, may_fail=True)


@contextlib.contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Inside, SIGTERM raises like Ctrl-C does, so that what was made is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tool(name: str) -> str | None:
    """Users' search paths often leave out where administrators' tools are."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _ip(*words: str) -> None:
    _run("ip", *words)


def _run(tool: str, *words: str, may_fail: bool = False) -> None:
    done = subprocess.run(
        [_tool(tool) or tool, *words], capture_output=True, text=True, check=False
    )
    if done.returncode and not may_fail:
        raise RunError(f"{tool} {' '.join(words)}: {done.stderr.strip() or done.returncode}")
