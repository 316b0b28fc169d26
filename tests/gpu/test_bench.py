"""Every benchmark runs on CUDA and agrees with plain torch; the clock tells the long from the short."""

import pytest
import torch

from tutelx.bench.rows import measure
from tutelx.bench.shapes import Shape
from tutelx.bench.subjects import SUBJECTS
from tutelx.bench.timing import clock_for


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", SUBJECTS)
def test_a_row(op, dtype):
    device = torch.device("cuda")
    shape, clock = Shape(T=200, D=64, K=2, E=8, H=32), clock_for(device, 2**20)
    row = measure(SUBJECTS[op], shape, dtype, device=device, peers={}, seconds=0.01, clock=clock)
    assert row.status == "ok", row.error
    assert all(each.stats.median > 0 for each in row.measured)


def test_the_clock_measures_the_device():
    clock = clock_for(torch.device("cuda"), 0)
    short, long = (lambda n=n: torch.cuda._sleep(n) for n in (200_000, 20_000_000))
    clock([short])
    assert 20 < clock([long]) / clock([short]) < 500
