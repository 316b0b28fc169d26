"""The checks can fail: each of these changes to a kernel's source is caught, by a wrong answer or by a diagnosis."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cuda_checks as checks
import pytest
from cuda_emulator import Kernels, Mutation


@dataclass(frozen=True, kw_only=True)
class Mutant:
    name: str
    mutation: Mutation
    check: Callable[[Kernels], None]
    quick: bool = False  # part of the default run: each mutant is compiled


def route(kernels):
    checks.check_route(kernels, 5, 700, 5, 37, 20, padded=False, ordered=True)
    checks.check_route(kernels, 6, 1501, 3, 37, 200, padded=True, ordered=False)


def encode(kernels):
    checks.check_encode(kernels, 1, 19, 3, 5, 40, "f32", padded=True)
    checks.check_encode(kernels, 2, 5, 6, 4, 1033, "bf16", padded=False)


def decode(kernels):
    checks.check_decode(kernels, 1, 19, 3, 5, 40, "f32", "f32", padded=True)
    checks.check_decode(kernels, 2, 5, 6, 4, 4096, "bf16", "f32", padded=False)
    checks.check_decode(kernels, 3, 5, 2, 4, 3400, "bf16", "f32", padded=False)
    checks.check_decode(kernels, 6, 4, 6, 9, 64, "f32", "f32", padded=False)  # sixth choices that are kept


def clear_empty(kernels):
    checks.check_clear_empty(kernels, 1, 19, 3, 5, 40, "f32")
    checks.check_clear_empty(kernels, 2, 700, 3, 300, 5, "bf16")


def gate(kernels):
    for score in ("softmax", "sigmoid"):
        checks.check_gate(kernels, 1, 37, 70, 5, score, True, "f32")


def gate_in_groups(kernels):
    options = {"groups": 6, "kept": 2, "best_of": 2}
    checks.check_gate(kernels, 1, 37, 72, 5, "sigmoid", True, "f32", biased=True, **options)
    checks.check_gate(kernels, 2, 21, 72, 5, "softmax", True, "f32", **options)
    checks.check_gate(kernels, 3, 4500, 4, 2, "softmax", True, "f32", groups=2, kept=1)  # several tokens a warp


def activation(kernels):
    for kind in ("silu", "gelu", "gelu_tanh", "relu"):
        checks.check_activation(kernels, 1, 5, 40, kind, "f32", gated=True, padding=8)


MUTANTS = [
    Mutant(
        name="no barrier after clearing the histogram",
        check=route,
        mutation=Mutation(file="route.cu", old="histogram[e] = 0;\n  __syncthreads();", new="histogram[e] = 0;"),
    ),
    Mutant(
        name="no barrier between rounds of the scan",
        check=route,
        mutation=Mutation(
            file="route.cu", old="    __syncthreads();  // before the next round overwrites warp_totals\n", new=""
        ),
    ),
    Mutant(
        name="locations read and written without an order",
        check=route,
        mutation=Mutation(file="route.cu", old="+ rank : 0;\n      __syncwarp();", new="+ rank : 0;"),
        quick=True,
    ),
    Mutant(
        name="scan off by one",
        check=route,
        mutation=Mutation(file="route.cu", old="if (lane >= step) x += below;", new="if (lane > step) x += below;"),
        quick=True,
    ),
    Mutant(
        name="inclusive instead of exclusive",
        check=route,
        mutation=Mutation(file="route.cu", old="mine[c] = before + upto - n;", new="mine[c] = before + upto;"),
    ),
    Mutant(
        name="rank counts itself",
        check=route,
        mutation=Mutation(file="route.cu", old="same & ((1u << lane) - 1)", new="same & ((2u << lane) - 1)"),
    ),
    Mutant(
        name="one slot too many kept",
        check=route,
        mutation=Mutation(file="route.cu", old="location < out.capacity)", new="location <= out.capacity)"),
    ),
    Mutant(
        name="choices before tokens",
        check=route,
        mutation=Mutation(file="route.cu", old="const int32_t k = i / T;", new="const int32_t k = i % K;"),
    ),
    Mutant(
        name="barrier in a branch",
        check=route,
        mutation=Mutation(
            file="route.cu", old="  // 3. The same", new="  if (threadIdx.x < 40) __syncthreads();\n  // 3. The same"
        ),
    ),
    Mutant(
        name="empty rows not written",
        check=encode,
        mutation=Mutation(file="empty_rows.cuh", old="source[mine] < 0", new="source[mine] < -1"),
        quick=True,
    ),
    Mutant(
        name="another token's row",
        check=encode,
        mutation=Mutation(file="encode.cu", old="x + t * D", new="x + t / 2 * D"),
    ),
    Mutant(
        name="one vector too many",
        check=encode,
        mutation=Mutation(file="encode.cu", old="if (at < teams.vectors) store", new="if (at <= teams.vectors) store"),
    ),
    Mutant(
        name="last vectors of a round forgotten",
        check=encode,
        mutation=Mutation(file="encode.cu", old="v += kVectorsAThread * teams.size", new="v += 5 * teams.size"),
    ),
    Mutant(
        name="one empty row of several",
        check=clear_empty,
        mutation=Mutation(file="empty_rows.cuh", old="empty &= empty - 1", new="empty = 0"),
        quick=True,
    ),
    Mutant(
        name="rows of another warp",
        check=clear_empty,
        mutation=Mutation(file="empty_rows.cuh", old="first + lane * warps", new="first + lane"),
    ),
    Mutant(
        name="the same row for all lanes",
        check=clear_empty,
        mutation=Mutation(file="empty_rows.cuh", old="first + (__ffs(empty) - 1) * warps", new="first"),
    ),
    Mutant(
        name="vectors where D does not allow them",
        check=encode,
        mutation=Mutation(file="common.cuh", old="all_aligned && D % wide == 0", new="all_aligned"),
    ),
    Mutant(
        name="tail of a group read",
        check=decode,
        mutation=Mutation(file="gather_sum.cuh", old="k0 + i < K ? dest_K[k0 + i] : -1", new="dest_K[(k0 + i) % K]"),
    ),
    Mutant(
        name="one group of choices only",
        check=decode,
        mutation=Mutation(file="gather_sum.cuh", old="kAhead > 1 ? kGroup : K", new="kGroup"),
    ),
    Mutant(
        name="vectors ahead not added",
        check=decode,
        mutation=Mutation(file="gather_sum.cuh", old="if (v + a * teams.size >=", new="if (v + 2 * a * teams.size >="),
    ),
    Mutant(
        name="vectors ahead skipped",
        check=decode,
        mutation=Mutation(file="decode.cu", old="v += kAhead * teams.size", new="v += (kAhead + 1) * teams.size"),
    ),
    Mutant(
        name="neighbour's weight",
        check=decode,
        mutation=Mutation(file="gather_sum.cuh", old="weights, t * K + k0 + i)", new="weights, t * K + k0)"),
    ),
    Mutant(
        name="no barrier before the next group",
        check=decode,
        mutation=Mutation(
            file="decode.cu", old="  __syncthreads();  // before the next group overwrites warp_parts\n", new=""
        ),
        quick=True,
    ),
    Mutant(
        name="half the warps summed",
        check=decode,
        mutation=Mutation(file="decode.cu", old="w < warps; ++w", new="w < warps / 2; ++w"),
    ),
    Mutant(
        name="dropped choices not written",
        check=decode,
        mutation=Mutation(
            file="decode.cu", old="if (rank == 0 && t < tokens && k0 + i < K)", new="if (rank == 0 && row[i] >= 0)"
        ),
    ),
    Mutant(
        name="empty rows not written",
        check=decode,
        mutation=Mutation(file="decode.cu", old="  zero_empty_rows<T, W>(source, drows, R, teams.vectors);\n", new=""),
    ),
    Mutant(
        name="half a warp summed",
        check=decode,
        mutation=Mutation(
            file="common.cuh", old="int step = width / 2; step > 0", new="int step = width / 4; step > 0"
        ),
    ),
    Mutant(
        name="higher index wins ties",
        check=gate,
        mutation=Mutation(file="gate.cu", old="if (key > mine)", new="if (key >= mine)"),
        quick=True,
    ),
    Mutant(
        name="winner stays a candidate",
        check=gate,
        mutation=Mutation(file="gate.cu", old="taken |= 1u << (e / kWarpSize)", new="taken |= 1u << (e % kWarpSize)"),
    ),
    Mutant(
        name="sign of the key",
        check=gate,
        mutation=Mutation(file="gate.cu", old="bits >> 31 ? ~bits", new="bits >> 30 ? ~bits"),
    ),
    Mutant(
        name="no barrier before warps are summed",
        check=gate,
        mutation=Mutation(
            file="gate.cu", old="  __syncthreads();\n  for (int e = threadIdx.x", new="  for (int e = threadIdx.x"
        ),
    ),
    Mutant(
        name="a warp's sums left out",
        check=gate,
        mutation=Mutation(
            file="gate.cu",
            old="sum += static_cast<A>(warp_sums[w * E + e])",
            new="sum += w ? static_cast<A>(warp_sums[w * E + e]) : A(0)",
        ),
    ),
    Mutant(
        name="renormalisation without its mean",
        check=gate,
        mutation=Mutation(file="gate.cu", old="(dweights[k] - mean) /", new="dweights[k] /"),
    ),
    Mutant(
        name="all groups kept",
        check=gate_in_groups,
        mutation=Mutation(file="gate.cu", old="if (better < choice.kept)", new="if (better <= choice.groups)"),
    ),
    Mutant(
        name="higher group wins ties",
        check=gate_in_groups,
        mutation=Mutation(file="gate.cu", old="theirs == mine && other < g", new="theirs == mine && other > g"),
        quick=True,
    ),
    Mutant(
        name="the best two by the best alone",
        check=gate_in_groups,
        mutation=Mutation(file="gate.cu", old="        second = first;\n", new=""),
    ),
    Mutant(
        name="no barrier between goodness and its reading",
        check=gate_in_groups,
        mutation=Mutation(file="gate.cu", old="  __syncwarp();\n  uint32_t kept = 0;", new="  uint32_t kept = 0;"),
    ),
    Mutant(
        name="no barrier before the next token's goodness",
        check=gate_in_groups,
        mutation=Mutation(
            file="gate.cu", old="  __syncwarp();  // before the next token overwrites goodness\n", new=""
        ),
    ),
    Mutant(
        name="weighed with the bias",
        check=gate_in_groups,
        mutation=Mutation(
            file="gate.cu",
            old="[&](int e, A) { return score_of(widen(logits_E[e])); }",
            new="[&](int, A x) { return x; }",
        ),
    ),
    Mutant(
        name="silu for its slope",
        check=activation,
        mutation=Mutation(file="activation.cu", old="s * (A(1) + x * (A(1) - s))", new="s * (A(1) + x * s)"),
    ),
    Mutant(
        name="stride of the other operand",
        check=activation,
        mutation=Mutation(file="activation.cu", old="a.up_stride), operand<T>(out", new="a.H), operand<T>(out"),
        quick=True,
    ),
    Mutant(
        name="up forgotten",
        check=activation,
        mutation=Mutation(file="activation.cu", old="dvalue *= widen(u.at[w]);", new=""),
    ),
]


def under_several_orders(check, mutation=None):
    for seed in (0, 1, 2):
        check(Kernels(seed=seed, mutation=mutation))


RUN_MUTANT = """
import sys
from cuda_emulator import EmulationError
from test_cuda_mutants import MUTANTS, under_several_orders
mutant = MUTANTS[int(sys.argv[1])]
try:
    under_several_orders(mutant.check, mutant.mutation)
except (AssertionError, EmulationError):
    print("caught")
"""


def parameter(number: int):
    mutant = MUTANTS[number]
    marks = [] if mutant.quick else [pytest.mark.slow]
    return pytest.param(number, marks=marks, id=f"{mutant.check.__name__}: {mutant.name}")


@pytest.mark.parametrize("number", [parameter(n) for n in range(len(MUTANTS))])
def test_mutant_is_caught(number):
    """In a process of its own, which a kernel that writes far outside its arrays may end."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", RUN_MUTANT, str(number)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    crashed = done.returncode < 0
    assert crashed or "caught" in done.stdout, done.stderr[-4000:]


@pytest.mark.parametrize("check", dict.fromkeys(m.check for m in MUTANTS), ids=lambda check: check.__name__)
def test_the_unchanged_kernel_passes(check):
    under_several_orders(check)
