"""Fingerprints: what makes two machines one, names of folders, and probing where there is nothing to ask."""

import json
import logging
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from tests.tuning.cases import HERE, on
from tutelx import machine
from tutelx.errors import InvalidValueError
from tutelx.tuning import here as here_module
from tutelx.tuning import links, nvml, probe
from tutelx.tuning.hardware import Hardware
from tutelx.tuning.here import here

H100 = Hardware(
    device="cuda", arch="sm_90", units=132, memory_bytes=80 * 2**30, memory_rate=3000.0, cache_bytes=50 * 2**20
)


def test_same_as():
    assert HERE.same_as(on(HERE, aliases={}, memory_bytes=2**40, memory_rate=29.9))
    assert not HERE.same_as(on(HERE, memory_rate=31.0))
    assert not HERE.same_as(on(HERE, units=4))
    assert not HERE.same_as(on(HERE, matrix_unit="amx"))
    assert H100.same_as(on(H100, memory_rate=2100.0, memory_bytes=79 * 2**30))
    assert not H100.same_as(on(H100, memory_rate=1900.0))
    assert not H100.same_as(on(H100, memory_bytes=141 * 2**30))
    linked = on(HERE, intra_link="tcp", intra_rate=1.0, ranks_per_node=2)
    assert not HERE.same_as(linked)
    assert HERE.same_as(linked, links=False)
    assert linked.same_as(on(linked, intra_rate=2.4))
    assert not linked.same_as(on(linked, intra_rate=2.6))


def test_distance():
    # One octave of units, one of memory rate, half of the cache.
    assert HERE.distance(on(HERE, units=4, memory_rate=5.0, cache_bytes=2**24)) == pytest.approx(3.0)
    assert HERE.distance(HERE) == 0.0
    assert HERE.distance(on(HERE, matrix_unit="avx2")) == 1.0
    assert HERE.distance(on(HERE, arch="aarch64")) == float("inf")
    assert H100.distance(on(H100, arch="sm_100")) == float("inf")
    assert H100.distance(HERE) == float("inf")
    linked = on(HERE, intra_link="tcp", intra_rate=4.0)
    assert linked.distance(on(linked, intra_rate=1.0)) == 2.0
    assert linked.distance(on(linked, intra_rate=1.0), links=False) == 0.0
    assert HERE.distance(linked) == linked.distance(HERE) == 2.0  # unknown: its kind and its rate count one each


def test_folder():
    assert HERE.folder == "cpu-x86_64-avx512-2c-32m"
    assert H100.folder == "cuda-sm_90-132sm-80g-50m"
    assert on(HERE, intra_link="tcp", intra_rate=3.0, ranks_per_node=4).folder == "cpu-x86_64-avx512-2c-32m-4x-tcp"
    assert on(HERE, memory_rate=99.0, aliases={}).folder == HERE.folder
    assert on(HERE, arch="../../etc").folder == "cpu-_etc-avx512-2c-32m"


def test_json_and_back():
    for hardware in (HERE, H100, on(HERE, intra_link="tcp", intra_rate=1.5, ranks_per_node=2)):
        again = Hardware.from_json(json.loads(json.dumps(hardware.to_json())))
        assert again == hardware
        assert again.aliases == hardware.aliases


@pytest.mark.parametrize(
    "change",
    [
        {"units": 0},
        {"units": True},
        {"units": 2.0},
        {"memory_rate": -1.0},
        {"memory_rate": "10"},
        {"arch": "../../etc"},
        {"arch": ""},
        {"device": "tpu"},
        {"intra_rate": 1.0},
        {"aliases": {"cpu": 1}},
        {"aliases": {"cpu": "\x1b[2J"}},
        {"colour": "red"},
    ],
)
def test_json_that_is_no_hardware(change):
    with pytest.raises(InvalidValueError, match=next(iter(change)) if "intra_rate" not in change else "link rate"):
        Hardware.from_json({**HERE.to_json(), **change})


def test_cpu_probe(monkeypatch):
    monkeypatch.setattr(machine, "caches", lambda: {"L2": 2**20, "L3": 2**25})
    monkeypatch.setattr(machine, "usable_cores", lambda: 3)
    monkeypatch.setattr(machine, "memory_bytes", lambda: 2**34)
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset({"avx2", "avx512f", "sse"}))
    asked = []
    found = probe.cpu(lambda threads, size: asked.append((threads, size)) or 12.345)
    assert asked == [(3, 2**27)]  # four caches
    assert (found.units, found.cache_bytes, found.memory_bytes, found.memory_rate) == (3, 2**25, 2**34, 12.35)
    assert found.matrix_unit == "avx512"


def test_cpu_probe_where_the_system_tells_nothing(monkeypatch):
    monkeypatch.setattr(machine, "caches", dict)
    monkeypatch.setattr(machine, "memory_bytes", lambda: None)
    monkeypatch.setattr(machine, "cpu_flags", frozenset)
    found = probe.cpu(lambda threads, size: 1.0)
    assert Hardware.from_json(found.to_json()) == found


def test_memory_rate_is_measured():
    assert 0 < probe.memory_rate(2, 2**16) < 1e6


class NVMLError(Exception):
    pass


def library(**functions):
    """A driver that knows the given functions and refuses the others."""

    def refuse(*args):
        raise NVMLError("no permission")

    names = ("Init", "DeviceGetHandleByIndex", "DeviceGetHandleByUUID", "SystemGetDriverVersion")
    names += ("DeviceGetNvLinkState", "DeviceGetCurrentClocksEventReasons")
    return SimpleNamespace(NVMLError=NVMLError, **{f"nvml{name}": functions.get(name, refuse) for name in names})


def test_nvml():
    asked = []
    driver = library(
        Init=lambda: None,
        DeviceGetHandleByUUID=lambda uuid: asked.append(uuid) or "card",
        SystemGetDriverVersion=lambda: "580.1",
        DeviceGetNvLinkState=lambda card, link: link == 3,
        DeviceGetCurrentClocksEventReasons=lambda card: 0x4 | 0x40,  # its power limit, and heat
    )
    card = nvml.Nvml(driver, uuid="ab-cd")
    assert asked == ["GPU-ab-cd"]
    assert (card.found, card.driver(), card.link()) == (True, "580.1", "nvlink")
    assert card.throttling() == {"hardware thermal slowdown"}


def test_nvml_without_permission_driver_or_package(monkeypatch):
    refused = nvml.Nvml(library(Init=lambda: None, DeviceGetHandleByIndex=lambda index: "card"))
    assert (refused.found, refused.driver(), refused.link(), refused.throttling()) == (True, "", "pcie", None)
    for driver in (library(), library(Init=lambda: None)):
        card = nvml.Nvml(driver)
        assert (card.found, card.driver(), card.link(), card.throttling()) == (False, "", "", None)
    monkeypatch.setattr(nvml, "_library", lambda: None)
    assert not nvml.Nvml().found


def test_throttled():
    assert nvml.throttled(None, None) == ()
    assert nvml.throttled(frozenset(), frozenset()) == ()
    assert nvml.throttled(frozenset({"b"}), frozenset({"a", "b"})) == ("a", "b")


@pytest.fixture
def fresh(monkeypatch):
    """Nothing is known yet; returns what was measured."""
    measured = []
    monkeypatch.setattr(here_module, "_known", {})
    monkeypatch.setattr(probe, "cpu", lambda: measured.append(1) or HERE)
    return measured


def test_here_measures_once_for_all_processes(fresh, tmp_path, monkeypatch):
    assert here(folder=tmp_path) is here(folder=tmp_path)
    monkeypatch.setattr(here_module, "_known", {})  # as another process
    assert here(folder=tmp_path) == HERE
    assert len(fresh) == 1
    monkeypatch.setattr(here_module, "_known", {})
    monkeypatch.setattr(machine, "usable_cores", lambda: 77)  # the file is somebody else's
    here(folder=tmp_path)
    assert len(fresh) == 2
    assert len(json.loads((tmp_path / "hardware.json").read_text())["machines"]) == 2


def test_here_takes_what_another_rank_measured_while_it_waited(fresh, tmp_path, monkeypatch):
    here(folder=tmp_path)
    text = (tmp_path / "hardware.json").read_text()
    (tmp_path / "hardware.json").unlink()
    monkeypatch.setattr(here_module, "_known", {})

    @contextmanager
    def held_by_another(path):
        path.write_text(text)
        yield

    monkeypatch.setattr(here_module.files, "locked", held_by_another)
    assert here(folder=tmp_path) == HERE
    assert len(fresh) == 1


@pytest.mark.parametrize("text", ["", "[]", '{"schema":2,"machines":{}}', "\x00", '{"schema":1,"machines":{"a":{}}}'])
def test_here_with_a_broken_file(fresh, tmp_path, caplog, text):
    (tmp_path / "hardware.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        assert here(folder=tmp_path) == HERE
    assert "hardware.json is ignored" in caplog.text
    assert json.loads((tmp_path / "hardware.json").read_text())["schema"] == 1


def test_here_where_nothing_can_be_written(fresh, tmp_path):
    (tmp_path / "file").write_text("")
    assert here(folder=tmp_path / "file") is here(folder=tmp_path / "file") is HERE
    assert len(fresh) == 1


def small_probe(group, ranks_per_node):
    links.MOST_BYTES = 2**16
    return links.probe_links(group, ranks_per_node)


def test_links_are_the_same_on_all_ranks(ranks):
    first, *others = ranks(4).run(small_probe, 2)
    assert all(each == first for each in others)
    assert (first.intra_link, first.inter_link, first.ranks_per_node) == ("tcp", "tcp", 2)
    assert first.intra_rate > 0
    assert first.inter_rate > 0
    assert first.of(HERE).folder == "cpu-x86_64-avx512-2c-32m-2x-tcp-tcp"
    assert ranks(4).run(small_probe, 1)[0].intra_link == ""
    assert ranks(4).run(small_probe, None)[0].inter_link == ""


def test_links_of_uneven_nodes(ranks):
    with pytest.raises(InvalidValueError, match="ranks_per_node=3 does not divide the group's 4 ranks"):
        ranks(4).run(small_probe, 3)
