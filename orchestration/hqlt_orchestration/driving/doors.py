"""Which ports this process and its children listen on."""

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, order=True)
class Door:
    """A TCP port that a process of ours listens on. `address` is the device's; `::` and `0.0.0.0` are every device."""

    port: int
    address: str
    program: str

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        found = ipaddress.ip_address(self.address)
        mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
        return (mapped or found).is_loopback


def doors(pid: int | None = None) -> list[Door]:
    """Every port that the process `pid`, by default this one, and its descendants listen on."""
    return sorted(set(_doors(psutil.Process(pid))))


def _doors(process: psutil.Process) -> Iterator[Door]:
    for each in (process, *process.children(recursive=True)):
        try:
            name = each.name()
            listening = [found for found in each.net_connections("inet") if found.status == psutil.CONN_LISTEN]
        except psutil.Error:  # it has ended
            continue
        for found in listening:
            yield Door(found.laddr.port, found.laddr.ip, name)


def open_doors_sentence(found: list[Door]) -> str | None:
    """What to tell a user whose processes other machines can reach, or None where none can."""
    reachable = [f"{door.port} ({door.program})" for door in found if not door.is_loopback]
    if not reachable:
        return None
    return f"other machines can reach port {', '.join(reachable)}; Ray's token authentication is on"
