"""Slow and obvious versions of the ops, in numpy and float64. They share nothing with the kernels.

Legend: T tokens, K choices a token, E experts, R rows, D model dim, H expert hidden dim.
"""

import math

import numpy as np


def route(expert_ids, E, capacity=-1, padded=False, order=None):
    T, K = expert_ids.shape
    tokens = range(T) if order is None else order.tolist()
    waiting = [[] for _ in range(E)]  # each expert's slots, first come first
    for k in range(K):
        for t in tokens:
            if expert_ids[t, k] >= 0:
                waiting[expert_ids[t, k]].append(t * K + k)
    counts = np.array([len(slots) for slots in waiting], dtype=np.int32)
    dest = np.full((T, K), -1, dtype=np.int32)
    source = np.full(E * capacity if padded else T * K, -1, dtype=np.int32)
    offsets = [0]
    for slots in waiting:
        kept = slots if capacity < 0 else slots[:capacity]
        for location, slot in enumerate(kept):
            row = offsets[-1] + location
            dest[slot // K, slot % K] = row
            source[row] = slot
        offsets.append(offsets[-1] + (capacity if padded else len(kept)))
    return dest, source, counts, np.array(offsets, dtype=np.int32)


def encode(x_TD, source_R, K):
    rows = np.zeros((source_R.size, x_TD.shape[1]), dtype=x_TD.dtype)
    for r, slot in enumerate(source_R):
        if slot >= 0:
            rows[r] = x_TD[slot // K]
    return rows


def decode(rows_RD, dest_TK, weights_TK):
    T, K = dest_TK.shape
    y = np.zeros((T, rows_RD.shape[1]))
    for t in range(T):
        for k in range(K):
            if dest_TK[t, k] >= 0:
                y[t] += weights_TK[t, k] * rows_RD[dest_TK[t, k]]
    return y


def decode_backward(dy_TD, rows_RD, dest_TK, weights_TK):
    drows = np.zeros(rows_RD.shape)
    dweights = np.zeros(dest_TK.shape)
    for t, k in np.ndindex(*dest_TK.shape):
        r = dest_TK[t, k]
        if r >= 0:
            drows[r] = weights_TK[t, k] * dy_TD[t]
            dweights[t, k] = (dy_TD[t] * rows_RD[r]).sum()
    return drows, dweights


def logsumexp(x_E):
    best = x_E.max()
    return -np.inf if best == -np.inf else best + math.log(np.exp(x_E - best).sum())


def scores_of(x_E, score):
    if score == "sigmoid":
        return 1 / (1 + np.exp(-x_E))
    return np.exp(x_E - logsumexp(x_E))


def candidates(value_E, groups, kept, best_of):
    """The experts in the best groups, one after the other."""
    by_group = np.reshape(value_E, (groups, -1))
    goodness = np.sort(by_group, axis=1)[:, ::-1][:, :best_of].sum(axis=1)
    best = sorted(range(groups), key=lambda g: (-goodness[g], g))[:kept]
    return [g * by_group.shape[1] + i for g in best for i in range(by_group.shape[1])]


def gate(logits_TE, K, score, renormalize, bias=None, groups=1, kept=1, best_of=1):
    T, E = logits_TE.shape
    ids = np.zeros((T, K), dtype=np.int32)
    weights = np.zeros((T, K))
    score_sum = np.zeros(E)
    lse = np.zeros(T)
    for t, x in enumerate(logits_TE):
        s = scores_of(x, score)
        value = x if bias is None else s + bias
        ids[t] = sorted(candidates(value, groups, kept, best_of), key=lambda e: (-value[e], e))[:K]
        weights[t] = s[ids[t]]
        if renormalize:
            weights[t] /= weights[t].sum()
        score_sum += s
        lse[t] = logsumexp(x)
    return ids, weights, score_sum, lse


def gate_backward(dweights_TK, dscore_sum_E, dlse_T, logits_TE, ids_TK, score, renormalize):
    """By full Jacobians, one token at a time."""
    dlogits = np.zeros(logits_TE.shape)
    for t, x in enumerate(logits_TE):
        s, p = scores_of(x, score), scores_of(x, "softmax")
        chosen = s[ids_TK[t]]
        K = chosen.size
        dweights_dchosen = np.eye(K)
        if renormalize:
            total = chosen.sum()
            dweights_dchosen = np.eye(K) / total - np.outer(chosen, np.ones(K)) / total**2
        dscores = dscore_sum_E.copy()
        dscores[ids_TK[t]] += dweights_TK[t] @ dweights_dchosen
        dscores_dx = np.diag(s) - np.outer(s, s) if score == "softmax" else np.diag(s * (1 - s))
        dlogits[t] = dscores @ dscores_dx + dlse_T[t] * p
    return dlogits


def activation(x, kind):
    if kind == "silu":
        return x / (1 + np.exp(-x))
    if kind == "gelu":
        return x * 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2)))
    if kind == "gelu_tanh":
        return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return np.maximum(x, 0)


def activation_slope(x, kind):
    """By a central difference; relu's slope at 0 is 0."""
    if kind == "relu":
        return (x > 0).astype(float)
    step = 1e-4
    f = [activation(x + i * step, kind) for i in (-2, -1, 1, 2)]
    return (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * step)
