"""Sizes and settings at the door."""

import pytest

from tutelx.bench import shapes
from tutelx.bench.settings import Settings
from tutelx.bench.shapes import SETS, Shape
from tutelx.errors import InvalidValueError


def test_what_is_left_out_takes_its_default():
    (shape,) = shapes.parse(["T=16,K=3"])
    assert shape == Shape(T=16, D=1024, K=3, E=64, H=256)
    assert shape.rows == 48


def test_sets_and_lists_mix_and_a_shape_comes_once():
    assert shapes.parse(["small", "T=1,D=64,E=8,H=128", "T=5"]) == (*SETS["small"], Shape(T=5))


def test_every_set_has_a_single_token():
    for name, members in SETS.items():
        assert 1 in [shape.T for shape in members], name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("huge", "sizes='huge' is none of small, default, large"),
        ("Q=1", "'Q' is none of T, D, K, E, H, S"),
        ("T=1,T=2", "T is given twice"),
        ("T=-1", "T='-1' is not a positive whole number"),
        ("T=", "T='' is not"),
        ("T=1_0", "T='1_0' is not"),
        ("T=0", "T=0 must be an int of at least 1"),
        ("E=2,K=3", "K=3 exceeds E=2"),
        ("T=1,", "'' is none of"),
        ("E=16,K=4,S=5", "S=5 exceeds E/K=16/4"),
    ],
)
def test_a_wrong_size_is_named(text, message):
    with pytest.raises(InvalidValueError, match=message):
        shapes.parse([text])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ops": ("encod",)}, "op 'encod' is none of linear, gate, gate_backward, route, encode, "),
        ({"dtypes": ("int8",)}, "dtype 'int8' is none of float32"),
        ({"peers": ("torch",)}, "peer 'torch' is none of liger, scattermoe"),
        ({"device": "tpu"}, "device='tpu' is none of cpu, cuda"),
        ({"seconds": 0.0}, "seconds=0.0 must be positive and finite"),
        ({"seconds": float("nan")}, "seconds=nan must be positive"),
        ({"threads": 0}, "threads=0 must be at least 1"),
    ],
)
def test_a_wrong_setting_is_named(wrong, message):
    with pytest.raises(InvalidValueError, match=message):
        Settings(**wrong)
