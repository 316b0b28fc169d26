"""The fingerprint: what of it is read."""

import torch

from tutelx.tuner.machine import Machine, matrix_unit, memory_rate


def test_the_widest_unit_by_hand(tmp_path):
    path = tmp_path / "cpuinfo"
    for text, unit in (
        ("processor : 0\nflags\t\t: fpu avx2 avx512f avx512_bf16 fma\n", "avx512_bf16"),
        ("flags : avx2 avx512f\nmodel name : with amx_tile\n", "avx512"),
        ("Features\t: fp asimd\n", "neon"),
        ("flags : avx2 amx_tile\n", "amx"),
        ("flags : sse2\n", ""),
    ):
        path.write_text(text)
        assert matrix_unit(path) == unit
    assert matrix_unit(tmp_path / "nothing") == ""


def test_a_copy_has_a_rate_and_leaves_the_threads():
    before = torch.get_num_threads()
    assert 0.01 < memory_rate(torch.device("cpu"), 2**16) < 1e5
    assert torch.get_num_threads() == before


def test_two_looks_at_one_machine_are_one(monkeypatch):
    monkeypatch.setattr("tutelx.tuner.machine.last_level_cache", lambda device: 2**16)
    monkeypatch.setattr("tutelx.tuner.machine.memory_rate", lambda device, cache: 10.0)
    one, other = (Machine.here(torch.device("cpu")) for _ in range(2))
    assert one.hardware.same_as(other.hardware)
    assert one.hardware.units >= 1
    assert {"tutelx", "torch", "python"} <= set(one.software)
