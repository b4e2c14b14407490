"""Hosts of a network, each a network namespace of Linux, and the switch between them: its delay and loss are chosen.

The switch is a thread that takes frames from each host's end of a pair of virtual interfaces, and gives them to the
other hosts, later or never. (``tc netem`` would do the same, where the kernel has it.)
"""

from __future__ import annotations

import os
import random
import selectors
import shutil
import socket
import subprocess
import threading
import time
from collections import deque

import pytest

__all__ = ["Network", "need_hosts"]

ETH_P_ALL = 3
SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 15, 23  # of linux/if_packet.h
VNET_HEADER = 10
MTU_AND_OFFLOADS = 2**17


def need_hosts() -> None:
    """Skip, with the reason, where network namespaces cannot be made."""
    why = ""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        why = "only root makes them"
    elif shutil.which("ip") is None:
        why = "there is no command ip"
    else:
        probe = f"mpr-{os.getpid()}"
        made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
        subprocess.run(["ip", "netns", "del", probe], capture_output=True)
        why = made.stderr.strip()
    if why:
        pytest.skip(f"network namespaces: {why}")


class Network:
    """Hosts ``10.77.N.x``, the first of them this process's namespace, and their switch.

    Args:
        number: N, so that two networks are apart.
        names: of the hosts beside this one, whose addresses end in 2, 3, …

    Attributes:
        delay: seconds that each frame takes.
        loss: the share of frames that are lost.
        away: hosts that nothing reaches, and from whom nothing comes.
    """

    def __init__(self, number: int, names: list[str]) -> None:
        self.delay = 0.0
        self.loss = 0.0
        self.away: set[str] = set()
        self.namespaces: dict[str, str] = {}
        self.addresses = {"": f"10.77.{number}.1"}
        self._number = number
        self._ports: dict[str, socket.socket] = {}
        self._stop = False
        self._chance = random.Random(0)
        try:
            self._plug_in("", None)
            for name in names:
                namespace = f"mpr{number}-{name}"
                _ip("netns", "add", namespace)
                self.namespaces[name] = namespace
                self.addresses[name] = f"10.77.{number}.{len(self.addresses) + 1}"
                _ip("-n", namespace, "link", "set", "lo", "up")
                self._plug_in(name, namespace)
        except BaseException:
            self.close()
            raise
        self._thread = threading.Thread(target=self._forward, name="switch", daemon=True)
        self._thread.start()

    def inside(self, name: str) -> list[str]:
        """What is put before a command line to run it on a host."""
        return ["ip", "netns", "exec", self.namespaces[name]]

    def move(self, name: str, namespace: str) -> None:
        """Let the interface of a host be another's, which it keeps."""
        interface = f"mprh{self._number}-{name}"[:15]
        _ip("link", "set", interface, "netns", namespace)
        _ip("-n", namespace, "addr", "add", f"{self.addresses[name]}/24", "dev", interface)
        _ip("-n", namespace, "link", "set", interface, "up")

    def close(self) -> None:
        """Take the hosts apart; their processes have ended."""
        self._stop = True
        if hasattr(self, "_thread"):
            self._thread.join()
        for port in self._ports.values():
            port.close()
        for name in self.addresses:
            subprocess.run(["ip", "link", "del", f"mprs{self._number}-{name}"[:15]], capture_output=True)
        for namespace in self.namespaces.values():
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)

    def _plug_in(self, name: str, namespace: str | None) -> None:
        ours, theirs = f"mprs{self._number}-{name}"[:15], f"mprh{self._number}-{name}"[:15]
        _ip("link", "add", ours, "type", "veth", "peer", "name", theirs)
        if namespace is not None:
            _ip("link", "set", theirs, "netns", namespace)
        there = ["-n", namespace] if namespace is not None else []
        _ip(*there, "addr", "add", f"{self.addresses[name]}/24", "dev", theirs)
        _ip(*there, "link", "set", theirs, "up")
        _ip("link", "set", ours, "up")
        port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self._ports[name] = port
        port.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)  # large and unfinished frames stay what they are
        port.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        port.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**23)
        port.setblocking(False)
        port.bind((ours, ETH_P_ALL))

    def _forward(self) -> None:
        ready = selectors.DefaultSelector()
        for name, port in self._ports.items():
            ready.register(port, selectors.EVENT_READ, name)
        where: dict[bytes, str] = {}  # which host has an address
        late: deque[tuple[float, str, bytes]] = deque()
        while not self._stop:
            wait = 0.05 if not late else min(0.05, max(0.0, late[0][0] - time.monotonic()))
            for key, _ in ready.select(wait):
                name: str = key.data
                try:
                    frame = self._ports[name].recv(MTU_AND_OFFLOADS)
                except OSError:
                    continue
                target, source = frame[VNET_HEADER : VNET_HEADER + 6], frame[VNET_HEADER + 6 : VNET_HEADER + 12]
                where[source] = name
                to = [where[target]] if target in where else [other for other in self._ports if other != name]
                for other in to:
                    if not self.away & {name, other} and self._chance.random() >= self.loss:
                        late.append((time.monotonic() + self.delay, other, frame))
            while late and late[0][0] <= time.monotonic():
                _, other, frame = late.popleft()
                if other not in self.away:
                    try:
                        self._ports[other].send(frame)
                    except OSError:
                        pass  # lost: its queue is full
        ready.close()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
