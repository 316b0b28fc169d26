"""What every op means, in plain torch and plain loops. Slow and obvious; imports no kernel. The tests' oracle."""

from __future__ import annotations

from collections.abc import Callable

import torch


def gate(logits, top_k, *, score="softmax", normalize=True, bias=None, num_groups=1, kept_groups=1, best_of_group=1):
    """-> expert_ids [T, K] int32, weights [T, K], score_sum [E], logsumexp [T]."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    scores = torch.softmax(logits, dim=1) if score == "softmax" else torch.sigmoid(logits)
    values = (logits if bias is None else scores + bias).detach()
    size = logits.shape[1] // num_groups
    chosen = []
    for row in values.tolist():
        groups = [range(g * size, (g + 1) * size) for g in range(num_groups)]
        goodness = [sum(sorted((row[e] for e in group), reverse=True)[:best_of_group]) for group in groups]
        kept = sorted(range(num_groups), key=lambda g: (-goodness[g], g))[:kept_groups]
        candidates = [e for g in kept for e in groups[g]]
        chosen.append(sorted(candidates, key=lambda e: (-row[e], e))[:top_k])
    ids = torch.tensor(chosen, device=logits.device).reshape(len(values), top_k)
    weights = scores.gather(1, ids)
    if normalize:
        weights = weights / weights.sum(dim=1, keepdim=True)
    return ids.int(), weights, scores.sum(dim=0), torch.logsumexp(logits, dim=1)


def route(expert_ids, num_experts, capacity=None, *, layout="ragged", order=None):
    """-> dest [T, K], source [R], counts [E], offsets [E+1], as lists."""
    tokens, top_k = expert_ids.shape
    queues: list[list[tuple[int, int]]] = [[] for _ in range(num_experts)]
    for k in range(top_k):
        for t in range(tokens) if order is None else order.tolist():
            expert = int(expert_ids[t, k])
            if expert >= 0:
                queues[expert].append((t, k))
    counts = [len(queue) for queue in queues]
    if capacity is None and layout == "padded":
        capacity = max(counts)
    dest = [[-1] * top_k for _ in range(tokens)]
    source: list[int] = []
    offsets = [0]
    for queue in queues:
        kept = queue if capacity is None else queue[:capacity]
        for t, k in kept:
            dest[t][k] = len(source)
            source.append(t * top_k + k)
        if layout == "padded":
            source += [-1] * (capacity - len(kept))
        offsets.append(len(source))
    if layout == "ragged":
        source += [-1] * (tokens * top_k - len(source))
    return dest, source, counts, offsets


def encode(x, map):
    rows = []
    for slot in map.source.tolist():
        rows.append(x[slot // map.dest.shape[1]] if slot >= 0 else torch.zeros_like(x[0]))
    return torch.stack(rows) if rows else x.new_zeros((0, x.shape[1]))


def decode(rows, map, weights):
    out = []
    for t, row_of in enumerate(map.dest.tolist()):
        y = rows.new_zeros(rows.shape[1])
        for k, row in enumerate(row_of):
            if row >= 0:
                y = y + weights[t, k].to(rows.dtype) * rows[row]
        out.append(y)
    return torch.stack(out) if out else rows.new_zeros((0, rows.shape[1]))


def activation(gate, up=None, *, kind="silu"):
    functions: dict[str, Callable] = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "relu": torch.relu,
    }
    value = functions[kind](gate)
    return value if up is None else value * up


def expert_ffn(rows, map, weights, *, activation="silu"):
    """`weights` is an ops.ExpertWeights; each expert runs its rows through three plain products."""

    def of(tensors, expert, rank):
        if not tensors:
            return None
        return tensors[0][expert] if tensors[0].dim() == rank + 1 else tensors[expert]

    def linear(x, expert, matrix, bias):
        out = x @ of(matrix, expert, 2).T
        return out if not bias else out + of(bias, expert, 1)

    act = globals()["activation"]
    pieces = []
    offsets = map.offsets.tolist()
    for expert, count in enumerate(map.counts.tolist()):
        begin, end = offsets[expert], offsets[expert + 1]
        used = min(count, end - begin)
        x = rows[begin : begin + used]
        up = linear(x, expert, weights.up, weights.up_bias)
        if weights.gate:
            hidden = act(linear(x, expert, weights.gate, weights.gate_bias), up, kind=activation)
        else:
            hidden = act(up, kind=activation)
        pieces.append(linear(hidden, expert, weights.down, weights.down_bias))
        pieces.append(rows.new_zeros((end - begin - used, rows.shape[1])))
    pieces.append(rows.new_zeros((map.num_rows - offsets[-1], rows.shape[1])))
    return torch.cat(pieces)


def expert_linear(rows, map, weight, bias=()):
    """`weight` [E, O, I] and `bias` [E, O] or nothing; row by row."""
    out = []
    offsets = map.offsets.tolist()
    for row in range(map.num_rows):
        owner = next((e for e in range(map.num_experts) if offsets[e] <= row < offsets[e + 1]), None)
        if owner is None or row - offsets[owner] >= int(map.counts[owner]):
            out.append(rows.new_zeros(weight.shape[1]))
        else:
            y = weight[owner] @ rows[row]
            out.append(y + bias[owner] if len(bias) else y)
    return torch.stack(out) if out else rows.new_zeros((0, weight.shape[1]))
