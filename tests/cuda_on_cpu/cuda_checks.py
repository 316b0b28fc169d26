"""One check an op: makes a case from a seed, runs the kernels, compares with the references.

The tests run these checks on the kernels, and on broken copies of them to see the checks fail.
"""

from dataclasses import dataclass

import cuda_references as reference
import numpy as np
from cuda_emulator import Kernels, to_float, to_storage

# Half a unit in the last place: what one rounding may cost. f16 also has a smallest number.
ROUNDING = {"f32": 2**-24, "f64": 2**-53, "bf16": 2**-8, "f16": 2**-11}
SMALLEST = {"f32": 0, "f64": 0, "bf16": 0, "f16": 2**-25}
# What the arithmetic before that rounding may cost, relative to the size of what it adds up.
ARITHMETIC = {"f32": 2e-6, "f64": 1e-13, "bf16": 2e-6, "f16": 2e-6}


def assert_close(actual, exact, dtype, size=None):
    """`size`: the sum of the magnitudes of what was added up; where cancellation is possible it exceeds |exact|."""
    assert actual.shape == exact.shape, f"shape {actual.shape}, expected {exact.shape}"
    size = np.abs(exact) if size is None else size
    allowed = 1.001 * ROUNDING[dtype] * np.abs(exact) + SMALLEST[dtype] + ARITHMETIC[dtype] * size
    wrong = ~(np.abs(to_float(actual, dtype) - exact) <= allowed)
    if wrong.any():
        at = tuple(int(i[0]) for i in np.nonzero(wrong))
        got = to_float(actual, dtype)[at]
        raise AssertionError(f"{wrong.sum()} of {wrong.size} differ, first at {at}: {got}, expected {exact[at]}")


def random_ids(rng, T, K, E):
    """Distinct experts a token where there are enough of them, some slots unused, some experts much liked."""
    liking = rng.exponential(size=E)
    ids = np.array([rng.choice(E, K, replace=E < K, p=liking / liking.sum()) for _ in range(T)]).reshape(T, K)
    return np.where(rng.random((T, K)) < 0.1, -1, ids).astype(np.int32)


@dataclass(frozen=True, kw_only=True)
class Map:
    """A routing for encode and decode to follow, made by the reference."""

    dest: np.ndarray
    source: np.ndarray


def random_map(rng, T, K, E, padded):
    capacity = max(1, T * K // (2 * E)) if padded else [-1, max(1, T * K // (2 * E))][rng.integers(2)]
    dest, source, _, _ = reference.route(random_ids(rng, T, K, E), E, capacity, padded)
    return Map(dest=dest, source=source)


def check_route(kernels: Kernels, case_seed, T, K, E, capacity, padded, ordered, two_steps=False):
    rng = np.random.default_rng(case_seed)
    ids = random_ids(rng, T, K, E)
    order = rng.permutation(T).astype(np.int32) if ordered else None
    actual = kernels.route(ids, E, capacity, padded, order, two_steps)
    expected = reference.route(ids, E, capacity, padded, order)
    for name, a, b in zip(("dest", "source", "counts", "offsets"), actual, expected, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def check_encode(kernels: Kernels, case_seed, T, K, E, D, dtype, padded):
    rng = np.random.default_rng(case_seed)
    m = random_map(rng, T, K, E, padded)
    x = to_storage(rng.standard_normal((T, D)), dtype)
    np.testing.assert_array_equal(kernels.encode(x, m.dest, m.source, dtype), reference.encode(x, m.source, K))

    drows = to_storage(rng.standard_normal((m.source.size, D)), dtype)
    exact, ones = to_float(drows, dtype), np.ones((T, K))
    dx = kernels.encode_backward(drows, m.dest, dtype)
    assert_close(dx, reference.decode(exact, m.dest, ones), dtype, reference.decode(np.abs(exact), m.dest, ones))


def check_clear_empty(kernels: Kernels, case_seed, T, K, E, D, dtype):
    rng = np.random.default_rng(case_seed)
    m = random_map(rng, T, K, E, padded=True)
    rows = to_storage(rng.standard_normal((m.source.size, D)), dtype)
    expected = np.where(m.source[:, None] < 0, np.zeros_like(rows), rows)
    np.testing.assert_array_equal(kernels.clear_empty(rows, m.source, dtype), expected)


def check_decode(kernels: Kernels, case_seed, T, K, E, D, dtype, weights_dtype, padded):
    rng = np.random.default_rng(case_seed)
    m = random_map(rng, T, K, E, padded)
    R = m.source.size
    rows, dy = (to_storage(rng.standard_normal(shape), dtype) for shape in ((R, D), (T, D)))
    weights = to_storage(rng.random((T, K)), weights_dtype)
    rows[m.source < 0] = to_storage(np.array(np.nan), dtype)  # empty rows may hold anything
    rows_f, dy_f = np.nan_to_num(to_float(rows, dtype)), to_float(dy, dtype)
    weights_f = to_float(weights, weights_dtype)

    y = kernels.decode(rows, m.dest, weights, dtype, weights_dtype)
    size = reference.decode(np.abs(rows_f), m.dest, weights_f)
    assert_close(y, reference.decode(rows_f, m.dest, weights_f), dtype, size)

    drows, dweights = kernels.decode_backward(dy, rows, m.dest, m.source, weights, dtype, weights_dtype)
    exact_drows, exact_dweights = reference.decode_backward(dy_f, rows_f, m.dest, weights_f)
    _, size = reference.decode_backward(np.abs(dy_f), np.abs(rows_f), m.dest, weights_f)
    assert_close(drows, exact_drows, dtype)
    if dtype == "f64" and weights_dtype == "f32":
        assert_close(dweights, exact_dweights, "f32")
    else:
        assert_close(dweights, exact_dweights, weights_dtype, size)


def check_gate(kernels: Kernels, case_seed, T, E, K, score, renormalize, dtype, biased=False, **groups):
    """`groups`: groups, kept and best_of."""
    rng = np.random.default_rng(case_seed)
    logits = to_storage(2 * rng.standard_normal((T, E)), dtype)
    logits[rng.random((T, E)) < 0.2] = to_storage(np.array(3.5), dtype)  # ties among the best
    logits_f = to_float(logits, dtype)
    wide = "f64" if dtype == "f64" else "f32"

    bias = to_storage(rng.standard_normal(E) / 4, wide) if biased else None
    ids, weights, score_sum, logsumexp = kernels.gate(logits, K, score, renormalize, dtype, bias, **groups)
    exact = reference.gate(logits_f, K, score, renormalize, bias if bias is None else to_float(bias, wide), **groups)
    np.testing.assert_array_equal(ids, exact[0])
    for actual, expected in zip((weights, score_sum, logsumexp), exact[1:], strict=True):
        assert_close(actual, expected, wide, 1 + np.abs(expected))

    gradients = [to_storage(rng.standard_normal(shape), wide) for shape in ((T, K), (E,), (T,))]
    exact_gradients = [to_float(g, wide) for g in gradients]
    dlogits = kernels.gate_backward(*gradients, logits, ids, logsumexp, score, renormalize, dtype)
    expected = reference.gate_backward(*exact_gradients, logits_f, ids, score, renormalize)
    size = 10 + 10 * np.abs(exact_gradients[0]).sum(axis=1, keepdims=True)
    assert_close(dlogits, expected, dtype, np.broadcast_to(size, expected.shape))


def check_activation(kernels: Kernels, case_seed, N, H, kind, dtype, gated, padding=0):
    """`padding`: columns of other data between rows, as in one tensor that holds gate and up side by side."""
    rng = np.random.default_rng(case_seed)
    gate, up, dout = (to_storage(2 * rng.standard_normal((N, H + padding)), dtype) for _ in range(3))
    gate_f, up_f, dout_f = (to_float(a[:, :H], dtype) for a in (gate, up, dout))
    if not gated:
        up, up_f = None, np.ones((N, H))

    out = kernels.activation(gate, up, H, kind, dtype)
    value, slope = reference.activation(gate_f, kind), reference.activation_slope(gate_f, kind)
    assert_close(out, value * up_f, dtype, np.abs(gate_f * up_f))

    dgate, dup = kernels.activation_backward(dout, gate, up, H, kind, dtype)
    # The reference slope is a difference quotient, good to about 1e-11.
    size = 10 * np.abs(dout_f * up_f) * (1 + gate_f**2)
    assert_close(dgate, dout_f * up_f * slope, dtype, size * (100 if dtype == "f64" else 1))
    if gated:
        assert_close(dup, dout_f * value, dtype, np.abs(dout_f * gate_f))
