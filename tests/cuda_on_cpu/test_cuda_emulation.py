"""The emulation itself: it runs a correct kernel, and says what is wrong with a faulty one."""

import numpy as np
import pytest
from cuda_emulator import EmulationError, Kernels

FAULTS = {
    1: "uninitialised read",
    2: "barrier",
    3: "race|uninitialised read",  # a read before the write, or after it
    4: "divergent barrier",
    5: "exited lane",
    6: "out of bounds",
    7: "not in the mask",
    8: "different collectives|divergent",
    9: "race",
    10: "asked to fail",
    11: "invalid launch configuration",
}


def run(kernels, fault):
    out = kernels.output((64,), np.int32)
    kernels.call("self_test", "self_test", out, fault)
    return out.array


@pytest.mark.parametrize("seed", range(4))
def test_a_correct_kernel_runs(seed):
    np.testing.assert_array_equal(run(Kernels(seed=seed), 0), np.arange(63, -1, -1))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_kernel_is_diagnosed(fault, seed):
    with pytest.raises(EmulationError, match=FAULTS[fault]):
        run(Kernels(seed=seed), fault)


def test_the_next_launch_starts_clean():
    kernels = Kernels()
    with pytest.raises(EmulationError):
        run(kernels, 10)
    run(kernels, 0)
