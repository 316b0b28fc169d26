"""An emulated cluster on one machine: a network namespace a node, joined by links with a rate, a delay, a message cost.

    python benchmarks/cluster.py --nodes 2 --ranks-per-node 1 --rate 200mbit -- tutelx bench pipeline

starts torchrun in each node, with the command's ranks under it, and returns the command's exit code. Linux, root and
iproute2 are needed; without them it says what is missing and returns 77. `Cluster` is the same for Python.

Nodes have the addresses 10.77.0.1, 10.77.0.2, ... on eth0. Names carry the process id, so that several clusters can be
up at once; what a killed one left behind is removed by the next.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import namespaces
from benchmarks.namespaces import ClusterUnavailable, Link
from tutelx.cli._interrupts import held_interrupts
from tutelx.errors import InvalidValueError, TutelxError

USAGE, SKIPPED, TIMED_OUT, INTERRUPTED = 2, 77, 124, 130
PORT = 29500  # every cluster has a network of its own, so it is always free
MOST_NODES = 64
# As on the nodes of a real cluster. A pause between two exchanges does not begin again with small windows, and what
# the link carries meanwhile finds room, also while the processor computes and the reader has to wait for it.
TUNED = (
    "net.ipv4.tcp_slow_start_after_idle=0",
    "net.ipv4.tcp_rmem=4096 16777216 33554432",
    "net.ipv4.tcp_wmem=4096 16777216 33554432",
)
_GRACE = 15.0  # seconds that the other ranks have to notice that one has failed
_numbers = itertools.count()


class Cluster:
    """Nodes that are up inside a `with` block.

    Raises:
        InvalidValueError: fewer than 1 or more than 64 nodes.
        ClusterUnavailable: no root, no iproute2, or a kernel without what the link asks for.
    """

    def __init__(self, nodes: int, link: Link | None = None) -> None:
        if not 1 <= nodes <= MOST_NODES:
            raise InvalidValueError(f"nodes={nodes} is not within 1 and {MOST_NODES}")
        self.nodes = nodes
        self.link = Link() if link is None else link
        self.name = f"{namespaces.PREFIX}{os.getpid()}.{next(_numbers)}"
        self._namespaces: list[str] = []
        self._switch: subprocess.Popen | None = None
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> Cluster:
        if reason := namespaces.why_unavailable():
            raise ClusterUnavailable(reason)
        namespaces.remove_stale()
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def namespace(self, node: int) -> str:
        return f"{self.name}.{node}"

    @staticmethod
    def address(node: int) -> str:
        return f"10.77.0.{node + 1}"

    def start(
        self,
        command: Sequence[str],
        *,
        ranks_per_node: int = 1,
        torchrun: bool = True,
        env: Mapping[str, str] | None = None,
    ) -> list[subprocess.Popen]:
        """Starts the command as every rank: under a torchrun in each node, or, quicker, as plain processes.

        Both give RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, for `env://`.

        Args:
            env: on top of this process's environment.

        Returns:
            One process a node (torchrun), or one a rank, in their order.
        """
        if ranks_per_node < 1:
            raise InvalidValueError(f"ranks_per_node={ranks_per_node} must be at least 1")
        common = {
            **os.environ,
            # The tools beside this Python are meant: `python`, `tutelx`.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            # A network without names: torch would warn of it at every connection.
            "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
            **{f"{library}_SOCKET_IFNAME": "eth0" for library in ("GLOO", "TP", "NCCL")},
            **(env or {}),
        }
        started = []
        for node in range(self.nodes):
            if torchrun:
                launcher = [sys.executable, "-m", "torch.distributed.run", "--no-python"]
                launcher += ["--nnodes", str(self.nodes), "--node-rank", str(node)]
                launcher += ["--nproc-per-node", str(ranks_per_node), "--local-addr", self.address(node)]
                launcher += ["--master-addr", self.address(0), "--master-port", str(PORT)]
                started.append(self._spawn(node, [*launcher, *command], common))
                continue
            for local in range(ranks_per_node):
                place = {
                    "RANK": node * ranks_per_node + local,
                    "WORLD_SIZE": self.nodes * ranks_per_node,
                    "LOCAL_RANK": local,
                    "LOCAL_WORLD_SIZE": ranks_per_node,
                    "MASTER_ADDR": self.address(0),
                    "MASTER_PORT": PORT,
                }
                started.append(self._spawn(node, command, {**common, **{k: str(v) for k, v in place.items()}}))
        return started

    def run(self, command: Sequence[str], *, timeout: float | None = None, **options) -> int:
        """:meth:`start`, and waits. Returns 0, or the exit code of the first that failed; the others are then ended.

        timeout: seconds until all are ended and the answer is TIMED_OUT.
        """
        running = self.start(command, **options)
        end = math.inf if timeout is None else time.monotonic() + timeout
        code = 0
        while running:
            left = end - time.monotonic()
            if left <= 0:
                self._end_processes()
                return code or TIMED_OUT
            _wait_any(running, None if left == math.inf else left)
            for process in [each for each in running if each.poll() is not None]:
                running.remove(process)
                if process.returncode and not code:
                    code = process.returncode if process.returncode > 0 else 128 - process.returncode
                    end = min(end, time.monotonic() + _GRACE)
        return code

    def close(self) -> None:
        """Ends what runs in the nodes and removes them. A Ctrl-C meanwhile waits until that is done."""
        with held_interrupts():
            self._end_processes()
            if self._switch is not None:
                self._switch.communicate()  # it ends when its input does
                self._switch = None
            for namespace in self._namespaces:
                namespaces.remove(namespace)
            self._namespaces.clear()

    def _build(self) -> None:
        names = [self.namespace(node) for node in range(self.nodes)]
        if self.link.delay_ms:
            for name in names:
                self._add_namespace(name)
            self._start_delaying_switch(names)
        else:
            switch = f"{self.name}.sw"
            self._add_namespace(switch)
            namespaces.call("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
            namespaces.call("ip", "-n", switch, "link", "set", "br0", "up")
            for node, name in enumerate(names):
                self._add_namespace(name)
                port = ["peer", "name", f"port{node}", "netns", switch]
                namespaces.call("ip", "link", "add", "eth0", "netns", name, "type", "veth", *port)
                namespaces.call("ip", "-n", switch, "link", "set", f"port{node}", "master", "br0", "up")
                self._shape(switch, f"port{node}")
        for node, name in enumerate(names):
            namespaces.call("ip", "-n", name, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
            namespaces.call("ip", "-n", name, "link", "set", "eth0", "up")
            self._shape(name, "eth0")

    def _start_delaying_switch(self, names: Sequence[str]) -> None:
        """A switch in user space, since kernels without netem delay nothing. It makes each node's eth0."""
        rate = self.link.bits_per_second or 0.0
        with tempfile.TemporaryDirectory() as folder:
            program = f"{folder}/delay_switch"
            source = str(Path(__file__).with_name("delay_switch.cpp"))
            namespaces.call(os.environ.get("CXX", "g++"), "-std=c++17", "-O2", "-o", program, source)
            arguments = [str(round(self.link.delay_ms * 1e6)), str(round(rate)), *names]
            self._switch = subprocess.Popen(
                [program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, text=True
            )
            assert self._switch.stdout is not None
            if self._switch.stdout.readline() != "ready\n":
                raise ClusterUnavailable("the delaying switch did not start; its error is above")

    def _add_namespace(self, name: str) -> None:
        self._namespaces.append(name)
        namespaces.call("ip", "netns", "add", name)
        namespaces.call("ip", "-n", name, "link", "set", "lo", "up")
        for setting in TUNED:
            namespaces.call("ip", "netns", "exec", name, "sysctl", "-qw", setting)

    def _shape(self, namespace: str, device: str) -> None:
        if shaping := self.link.shaping():
            namespaces.call("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", *shaping)

    def _spawn(self, node: int, command: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen:
        inside = ["ip", "netns", "exec", self.namespace(node), *command]
        # Their own sessions: a Ctrl-C at the terminal comes here only, and here they are ended in order.
        process = subprocess.Popen(inside, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
        self._processes.append(process)
        return process

    def _end_processes(self) -> None:
        for namespace in self._namespaces:
            namespaces.end_all(namespace)
        for process in self._processes:
            process.wait()
        self._processes.clear()


def _wait_any(processes: Sequence[subprocess.Popen], timeout: float | None) -> None:
    """Until one of them has ended, or `timeout` seconds."""
    files = []
    try:
        for process in processes:
            files.append(os.pidfd_open(process.pid))
        select.select(files, [], [], timeout)
    except ProcessLookupError:
        pass
    finally:
        for file in files:
            os.close(file)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="cluster.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--nodes", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--ranks-per-node", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--rate", metavar="RATE", help="of each link, such as 200mbit (default: not limited)")
    parser.add_argument("--delay-ms", type=float, default=0.0, metavar="MS", help="from node to node, one way")
    parser.add_argument("--message-us", type=float, default=0.0, metavar="US", help="link time that a packet costs")
    parser.add_argument("--timeout", type=float, metavar="S", help="seconds until the command is ended (exit code 124)")
    parser.add_argument("--plain", action="store_true", help="start the ranks themselves instead of torchrun")
    parser.add_argument("command", nargs="+", help="what each rank runs, after --")
    args = parser.parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        link = Link(rate=args.rate, delay_ms=args.delay_ms, message_us=args.message_us)
        with Cluster(args.nodes, link) as cluster:
            options = {"ranks_per_node": args.ranks_per_node, "torchrun": not args.plain}
            return cluster.run(args.command, timeout=args.timeout, **options)
    except ClusterUnavailable as error:
        sys.stderr.write(f"cluster.py: skipped: {error}\n")
        return SKIPPED
    except TutelxError as error:
        sys.stderr.write(f"cluster.py: {error}\n")
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
