"""What the links between ranks are worth: measured over the very process group that will use them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from tutelx.errors import InvalidValueError
from tutelx.tuning import nvml
from tutelx.tuning.hardware import Hardware

LEAST_BYTES, MOST_BYTES, GROWTH = 2**16, 2**26, 4  # sent by a rank in one exchange
SECONDS = 0.2
_INFINIBAND = Path("/sys/class/infiniband")


@dataclass(frozen=True, kw_only=True)
class Links:
    """As in :class:`Hardware`: kinds, and GB/s that one rank sends while all do. "" and 0 where there is nobody."""

    intra_link: str = ""
    intra_rate: float = 0.0
    inter_link: str = ""
    inter_rate: float = 0.0
    ranks_per_node: int = 1

    def of(self, hardware: Hardware) -> Hardware:
        """The machine with these links."""
        return replace(
            hardware,
            intra_link=self.intra_link,
            intra_rate=self.intra_rate,
            inter_link=self.inter_link,
            inter_rate=self.inter_rate,
            ranks_per_node=self.ranks_per_node,
        )


def probe_links(group: dist.ProcessGroup, ranks_per_node: int | None) -> Links:
    """Exchanges growing messages inside nodes and then between them, for about 0.2 s each. All ranks of the group must
    call, and all get the same.

    Args:
        ranks_per_node: consecutive ranks of the group that share a node; None: unknown, all count as one node.

    Raises:
        InvalidValueError: they do not divide the group.
    """
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    m = world if ranks_per_node is None else ranks_per_node
    if m < 1 or world % m:
        raise InvalidValueError(f"ranks_per_node={ranks_per_node} does not divide the group's {world} ranks")
    device = torch.device("cuda") if dist.get_backend(group) == "nccl" else torch.device("cpu")
    near = [peer for peer in range(world) if peer != rank and peer // m == rank // m]
    far = [peer for peer in range(world) if peer // m != rank // m]
    intra = _rate(group, near, device) if m > 1 else 0.0
    inter = _rate(group, far, device) if world > m else 0.0
    inside, between = _kinds(device)
    return Links(
        intra_link=inside if intra else "",
        intra_rate=intra,
        inter_link=between if inter else "",
        inter_rate=inter,
        ranks_per_node=m,
    )


def _rate(group: dist.ProcessGroup, peers: Sequence[int], device: torch.device) -> float:
    """GB/s, the best of messages that grow until SECONDS are over; three significant digits."""
    best, spent, size = 0.0, 0.0, LEAST_BYTES
    _exchange(group, peers, len(peers), device)  # connects
    while size <= MOST_BYTES:
        seconds = _exchange(group, peers, size, device)
        best = max(best, size / seconds / 1e9)
        spent += seconds
        # The next one takes this many times as long.
        if spent + GROWTH * seconds > SECONDS * 1.25:
            break
        size *= GROWTH
    return float(f"{best:.3g}")


def _exchange(group: dist.ProcessGroup, peers: Sequence[int], size: int, device: torch.device) -> float:
    """Seconds of the slowest rank to send `size` bytes, shared among the peers, and to receive as many."""
    splits = [0] * dist.get_world_size(group)
    for peer in peers:
        splits[peer] = max(1, size // len(peers))
    sent = torch.zeros(sum(splits), dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    _most(group, 0.0, device)  # all begin together
    begin = time.perf_counter()
    dist.all_to_all_single(received, sent, splits, splits, group=group)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(_most(group, time.perf_counter() - begin, device), 1e-9)


def _most(group: dist.ProcessGroup, value: float, device: torch.device) -> float:
    found = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return float(found)


def _kinds(device: torch.device) -> tuple[str, str]:
    """Inside a node and between nodes. gloo uses TCP for both."""
    if device.type == "cpu":
        return "tcp", "tcp"
    between = "infiniband" if _INFINIBAND.is_dir() and any(_INFINIBAND.iterdir()) else "tcp"
    return nvml.of_device(device).link() or "pcie", between
