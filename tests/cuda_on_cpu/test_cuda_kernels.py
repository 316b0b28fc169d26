"""Every kernel against its reference: all number types, odd sizes, several orders of the threads."""

import itertools

import cuda_checks as checks
import numpy as np
import pytest
from cuda_emulator import ACTIVATIONS, DTYPES, EmulationError, Kernels, to_storage

THREAD_ORDERS = (0, 1, 2)
WEIGHTED = [(dtype, weights) for dtype in DTYPES for weights in dict.fromkeys((dtype, "f32"))]

# ---- route -----------------------------------------------------------------------------------------------------------

ROUTE_SIZES = [
    (0, 2, 3),  # T, K, E
    (5, 0, 3),
    (1, 1, 1),
    (1, 4, 4),
    (33, 2, 7),
    (257, 3, 1),
    (130, 8, 8),
    (700, 5, 37),  # one block, several pieces
    (1501, 3, 37),  # several chunks
    (2600, 4, 200),
]
LAYOUTS = [(-1, False), (0, False), (3, False), (0, True), (3, True), (40, True)]


@pytest.mark.parametrize("ordered", [False, True], ids=["", "ordered"])
@pytest.mark.parametrize(("capacity", "padded"), LAYOUTS)
@pytest.mark.parametrize(("T", "K", "E"), ROUTE_SIZES)
def test_route(T, K, E, capacity, padded, ordered):
    for seed in THREAD_ORDERS:
        checks.check_route(Kernels(seed=seed), seed, T, K, E, capacity, padded, ordered)


@pytest.mark.parametrize(("T", "K", "E"), [(0, 2, 3), (700, 5, 37), (2600, 4, 200)])
def test_route_in_two_steps(T, K, E):
    for capacity, padded in ((-1, False), (31, True)):
        checks.check_route(Kernels(seed=1), 5, T, K, E, capacity, padded, ordered=False, two_steps=True)


@pytest.mark.parametrize("E", [1024, 2500, 4096])
def test_route_with_many_experts(E):
    checks.check_route(Kernels(seed=3), 1, 650, 8, E, 2, padded=False, ordered=False)


def test_route_with_many_empty_rows():
    checks.check_route(Kernels(), 0, 3, 2, 5, 40_000, padded=True, ordered=False)


@pytest.mark.parametrize("bad", [7, -2, 2**31 - 1])
def test_route_refuses_an_expert_out_of_range(bad):
    ids = np.zeros((40, 2), dtype=np.int32)
    ids[31, 1] = bad
    for two_steps in (False, True):
        with pytest.raises(EmulationError, match="expert id outside"):
            Kernels().route(ids, 7, two_steps=two_steps)


@pytest.mark.parametrize("bad", [40, -1])
def test_route_refuses_an_order_out_of_range(bad):
    order = np.arange(40, dtype=np.int32)
    order[11] = bad
    with pytest.raises(EmulationError, match="order names a token"):
        Kernels().route(np.zeros((40, 2), dtype=np.int32), 7, order=order)


def test_route_refuses_what_it_cannot_do():
    ids = np.zeros((2, 1), dtype=np.int32)
    with pytest.raises(ValueError, match="returned cudaError_t 1"):
        Kernels().route(ids, 100_000)


# ---- encode and decode -----------------------------------------------------------------------------------------------

ROW_SIZES = [
    (0, 2, 3, 8),  # T, K, E, D
    (1, 1, 1, 1),
    (6, 3, 2, 0),
    (7, 2, 3, 16),
    (19, 3, 5, 40),
    (13, 5, 4, 33),
    (9, 9, 6, 64),
    (5, 2, 4, 1032),
    (3, 4, 2, 4096),  # teams of the whole block
    (3, 2, 2, 3400),  # of which some threads have fewer vectors
    (5, 1, 4, 1096),
]


@pytest.mark.parametrize("padded", [False, True], ids=["ragged", "padded"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "K", "E", "D"), ROW_SIZES)
def test_encode(T, K, E, D, dtype, padded):
    for seed in THREAD_ORDERS:
        checks.check_encode(Kernels(seed=seed), seed, T, K, E, D, dtype, padded)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "K", "E", "D"), [*ROW_SIZES, (700, 3, 300, 5)])
def test_clear_empty(T, K, E, D, dtype):
    for seed in THREAD_ORDERS:
        checks.check_clear_empty(Kernels(seed=seed), seed, T, K, E, D, dtype)


@pytest.mark.parametrize("padded", [False, True], ids=["ragged", "padded"])
@pytest.mark.parametrize(("dtype", "weights"), WEIGHTED)
@pytest.mark.parametrize(("T", "K", "E", "D"), ROW_SIZES)
def test_decode(T, K, E, D, dtype, weights, padded):
    for seed in THREAD_ORDERS:
        checks.check_decode(Kernels(seed=seed), seed, T, K, E, D, dtype, weights, padded)


@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_pointers(dtype):
    kernels = Kernels(seed=1, misalign=1)
    checks.check_encode(kernels, 3, 11, 3, 4, 64, dtype, padded=False)
    checks.check_decode(kernels, 3, 11, 3, 4, 64, dtype, dtype, padded=True)
    checks.check_clear_empty(kernels, 3, 11, 3, 4, 64, dtype)
    checks.check_activation(kernels, 3, 5, 64, "silu", dtype, gated=True)
    checks.check_gate(kernels, 3, 5, 64, 4, "softmax", True, dtype)


@pytest.mark.parametrize("K", [1, 2, 5])
def test_a_foreign_map_is_refused(K):
    rng = np.random.default_rng(0)
    m = checks.random_map(rng, 20, K, 4, padded=False)
    x, rows, weights = (rng.standard_normal(shape).astype(np.float32) for shape in ((20, 8), (20 * K, 8), (20, K)))
    dest = m.dest.copy()
    dest[11, 0] = 20 * K
    kernels = Kernels()
    for call in (
        lambda: kernels.encode(x, dest, m.source, "f32"),
        lambda: kernels.encode_backward(rows, dest, "f32"),
        lambda: kernels.decode(rows, dest, weights, "f32", "f32"),
        lambda: kernels.decode_backward(x, rows, dest, m.source, weights, "f32", "f32"),
    ):
        with pytest.raises(EmulationError, match="dest names a row outside"):
            call()


@pytest.mark.parametrize("seed", THREAD_ORDERS)
def test_decode_backward_is_bit_identical_for_any_order_of_threads(seed):
    rng = np.random.default_rng(0)
    m = checks.random_map(rng, 20, 3, 4, padded=False)
    rows, dy = (to_storage(rng.standard_normal((n, 1000)), "f32") for n in (60, 20))
    weights = to_storage(rng.random((20, 3)), "f32")
    arguments = dy, rows, m.dest, m.source, weights, "f32", "f32"
    shuffled, in_order = (Kernels(seed=s).decode_backward(*arguments) for s in (seed + 10, 0))
    for actual, expected in zip(shuffled, in_order):
        np.testing.assert_array_equal(actual, expected)


# ---- gate ------------------------------------------------------------------------------------------------------------

GATE_SIZES = [
    (0, 5, 2),  # T, E, K
    (1, 1, 1),
    (3, 2, 2),
    (37, 8, 2),
    (9, 33, 33),
    (14, 60, 5),
    (5, 130, 7),
    (6, 256, 40),
    (3, 400, 8),
    (3, 1024, 9),
]


@pytest.mark.parametrize("renormalize", [False, True], ids=["", "renormalize"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "E", "K"), GATE_SIZES)
def test_gate(T, E, K, dtype, score, renormalize):
    for seed in THREAD_ORDERS:
        checks.check_gate(Kernels(seed=seed), seed, T, E, K, score, renormalize, dtype)


GROUPED_SIZES = [
    (0, 6, 2, 3, 2, 1),  # T, E, K, groups, kept, best_of
    (5, 1, 1, 1, 1, 2),
    (9, 12, 3, 12, 5, 2),
    (11, 60, 7, 4, 2, 2),
    (6, 99, 6, 33, 3, 1),
    (4, 256, 8, 8, 4, 2),
    (3, 512, 20, 256, 40, 2),
    (3, 1024, 9, 2, 1, 2),
]


@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "E", "K", "groups", "kept", "best_of"), GROUPED_SIZES)
def test_gate_with_groups(T, E, K, groups, kept, best_of, dtype, biased):
    for seed, score in zip(THREAD_ORDERS, itertools.cycle(["sigmoid", "softmax"])):
        kernels, options = Kernels(seed=seed), {"groups": groups, "kept": kept, "best_of": best_of}
        checks.check_gate(kernels, seed, T, E, K, score, True, dtype, biased=biased, **options)


def test_gate_with_a_bias_alone():
    checks.check_gate(Kernels(), 0, 9, 70, 5, "sigmoid", True, "f32", biased=True)


@pytest.mark.parametrize(
    "groups", [(4, 2, 1), (3, 4, 1), (3, 0, 1), (3, 2, 3), (3, 1, 1), (0, 0, 1), (257, 2, 1)], ids=str
)
def test_gate_refuses_groups_that_do_not_fit(groups):
    E = 514 if groups[0] == 257 else 6
    with pytest.raises(ValueError, match=r"cudaError_t 1$"):
        Kernels().gate(np.zeros((2, E), dtype=np.float32), 3, "softmax", True, "f32", None, *groups)


def test_gate_with_groups_survives_logits_that_are_not_numbers():
    logits = np.random.default_rng(0).standard_normal((5, 12)).astype(np.float32)
    logits[0, 5] = np.nan
    logits[1] = np.nan
    logits[2, 4:8] = -np.inf
    logits[3, 9] = np.inf
    logits[4, 0:3] = np.inf, -np.inf, np.nan
    for bias in (None, np.zeros(12, dtype=np.float32)):
        ids, *_ = Kernels(seed=1).gate(logits, 6, "sigmoid", True, "f32", bias, 4, 2, 2)
        for t in range(5):
            assert len(set(ids[t])) == 6
            assert set(ids[t]) <= set(range(12))


def test_gate_with_more_tokens_than_warps_in_the_grid():
    checks.check_gate(Kernels(), 0, 4500, 3, 2, "softmax", True, "f32")
    checks.check_gate(Kernels(), 0, 4500, 4, 2, "softmax", True, "f32", groups=2, kept=1)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_survives_logits_that_are_not_numbers(dtype, score):
    T, E, K = 6, 37, 9
    logits = np.random.default_rng(0).standard_normal((T, E))
    logits[0, 5] = np.nan
    logits[1] = np.nan
    logits[2] = -np.inf
    logits[3, 4] = np.inf
    logits[4, ::2] = -np.nan
    logits[5, 3:] = -np.inf
    ids, _, _, logsumexp = Kernels(seed=1).gate(to_storage(logits, dtype), K, score, True, dtype)
    for t in range(T):
        assert len(set(ids[t])) == K
        assert set(ids[t]) <= set(range(E))
    assert 5 not in ids[0]  # NaN ranks last
    assert list(ids[1]) == list(range(K))
    assert list(logsumexp[2:4]) == [-np.inf, np.inf]
    assert ids[3, 0] == 4
    assert set(ids[5, :3]) == {0, 1, 2}


def test_gate_weights_are_zero_where_all_scores_underflow():
    logits = np.full((1, 4), -1e4, dtype=np.float32)
    _, weights, _, logsumexp = Kernels().gate(logits, 2, "sigmoid", True, "f32")
    np.testing.assert_array_equal(weights, 0)
    ones = [np.ones(shape, dtype=np.float32) for shape in ((1, 2), (4,))]
    ids, zero = np.array([[0, 1]], dtype=np.int32), np.zeros(1, dtype=np.float32)
    dlogits = Kernels().gate_backward(*ones, zero, logits, ids, logsumexp, "sigmoid", True, "f32")
    np.testing.assert_array_equal(dlogits, 0)


def test_gate_weights_add_up_where_all_scores_are_tiny():
    logits = np.full((1, 4), -100, dtype=np.float32)  # sigmoid: 4e-44, whose reciprocal overflows
    _, weights, _, _ = Kernels().gate(logits, 2, "sigmoid", True, "f32")
    np.testing.assert_array_equal(weights, 0.5)


# ---- activation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation(kind, dtype, gated):
    for seed, (N, H, padding) in enumerate([(0, 8, 0), (1, 1, 0), (5, 33, 0), (7, 64, 64), (3, 40, 3), (2, 1032, 8)]):
        checks.check_activation(Kernels(seed=seed), seed, N, H, kind, dtype, gated, padding)


def test_relu_keeps_nan():
    assert np.isnan(Kernels().activation(np.full((1, 4), np.nan, dtype=np.float32), None, 4, "relu", "f32")).all()
