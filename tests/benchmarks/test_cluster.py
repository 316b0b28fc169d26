"""The emulated cluster: what it is asked for, that it comes up, carries an all-reduce, and goes."""

import json
import os
import signal
import subprocess
import sys

import pytest

from benchmarks import cluster, namespaces
from benchmarks.cluster import Cluster, Link
from benchmarks.namespaces import ClusterUnavailable
from tutelx.errors import InvalidValueError

REASON = namespaces.why_unavailable()
needs_namespaces = pytest.mark.skipif(REASON is not None, reason=str(REASON))

ALL_REDUCE = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
x = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(x)
assert x.item() == 3 and dist.get_world_size() == 2
dist.destroy_process_group()
"""


def ours() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line.startswith(f"tutelx{os.getpid()}.")]


@needs_namespaces
def test_two_nodes_add_up_over_their_links():
    with Cluster(2, Link(rate="1gbit", message_us=8)) as nodes:
        assert len(ours()) == 3
        shown = subprocess.run(
            ["tc", "-n", nodes.namespace(1), "-j", "qdisc", "show", "dev", "eth0"], capture_output=True, check=True
        )
        options = json.loads(shown.stdout)[0]["options"]
        # 1 Gbit/s is 125 MB/s; 8 us of it are 1000 bytes.
        assert (options["rate"], options["overhead"]) == (125_000_000, 1000)
        assert nodes.run([sys.executable, "-c", ALL_REDUCE], torchrun=False, timeout=60) == 0
    assert ours() == []


@needs_namespaces
def test_ranks_are_numbered_node_by_node_and_a_failure_ends_the_others():
    # Rank 2 leaves with a code of its own if it is where it should be; the others would wait for a minute.
    code = """
import os, sys, time
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
if [os.environ[name] for name in names] == ["2", "0", "4", "2", "10.77.0.1"]:
    sys.exit(7)
sys.stdin.read() or time.sleep(60)
"""
    with pytest.MonkeyPatch.context() as patch, Cluster(2) as nodes:
        patch.setattr(cluster, "_GRACE", 0.0)
        assert nodes.run([sys.executable, "-S", "-c", code], torchrun=False, ranks_per_node=2, timeout=50) == 7
        assert nodes.run(["sleep", "60"], torchrun=False, timeout=0.01) == 124


@needs_namespaces
def test_delayed_links_carry_packets():
    with Cluster(2, Link(delay_ms=0.5, rate="10mbit")) as nodes:
        code = f"""
import os, socket
here = ("{nodes.address(0)}", 5000)
if os.environ["RANK"] == "0":
    with socket.create_server(here) as server:
        peer = server.accept()[0]
        assert peer.makefile().read() == "x" * 10_000
else:
    while True:
        try:
            peer = socket.create_connection(here)
            break
        except ConnectionRefusedError:
            pass
    peer.sendall(b"x" * 10_000)
"""
        assert nodes.run([sys.executable, "-S", "-c", code], torchrun=False, timeout=50) == 0
    assert ours() == []


@needs_namespaces
def test_an_interrupt_cleans_up(monkeypatch):
    monkeypatch.setattr(cluster, "_wait_any", lambda *args: signal.raise_signal(signal.SIGINT))
    assert cluster.main(["--plain", "--", "sleep", "60"]) == 130
    assert ours() == []


@needs_namespaces
def test_what_a_killed_cluster_left_is_removed():
    gone = subprocess.Popen(["true"])
    gone.wait()
    name = f"tutelx{gone.pid}.0.1"
    subprocess.run(["ip", "netns", "add", name], check=True)
    namespaces.remove_stale()
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert name not in listed


def test_without_root_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(namespaces.os, "geteuid", lambda: 1000)
    assert cluster.main(["--", "true"]) == 77
    assert capsys.readouterr().err == "cluster.py: skipped: network namespaces need root, this is user 1000\n"
    with pytest.raises(ClusterUnavailable, match="need root"), Cluster(1):
        pass


def test_without_iproute2_it_says_so(monkeypatch):
    monkeypatch.setattr(namespaces.os, "geteuid", lambda: 0)
    monkeypatch.setattr(namespaces.shutil, "which", lambda tool: None)
    assert namespaces.why_unavailable() == "iproute2 is needed: ip and tc not found"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"rate": "fast"}, "rate='fast' is no rate such as '200mbit'"),
        ({"rate": "1kbit"}, "rate='1kbit' is below 10kbit"),
        ({"delay_ms": -1.0}, "delay_ms=-1.0 must be finite and not negative"),
        ({"message_us": 5.0}, "message_us=5.0 is charged as link time, but rate=None has no limit"),
    ],
)
def test_impossible_links(asked, message):
    with pytest.raises(InvalidValueError, match=message):
        Link(**asked)


def test_impossible_clusters():
    with pytest.raises(InvalidValueError, match="nodes=0 is not within 1 and 64"):
        Cluster(0)
    with pytest.raises(InvalidValueError, match="ranks_per_node=0 must be at least 1"):
        Cluster(1).start(["true"], ranks_per_node=0)


def test_shaping_by_hand():
    # 80 Mbit/s is 10 MB/s: a millisecond is 10 kB, less than the largest packet and its headers, for which 72 KiB are
    # held; half a second is 5 MB.
    assert Link(rate="80mbit").shaping()[1:7] == ["rate", "80000000bit", "burst", "73728", "limit", "5073728"]
    # 8 Gbit/s is 1 MB a millisecond; 2 us are 2000 bytes.
    assert Link(rate="8gbit", message_us=2).shaping()[3:5] == ["burst", "1002000"]
    assert Link().shaping() == []
