"""Finds out by running it how a layer routes: which score, normalised or not, how many experts, in what precision.

T tokens, M model dim, E experts, K choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tutelx.integrations.parity import TOLERANCE, relative_error
from tutelx.integrations.rule import WIDE, TopKRule
from tutelx.integrations.spec import Declined, Returns, Undecided
from tutelx.integrations.subject import TOKENS, Subject

_SEEDS = 3
_POOL = 768
_COARSE = 1e-6  # of the first search, whose sums run in another order than the layer's

Errors = dict[tuple[str, bool, int], float]


@dataclass(frozen=True, kw_only=True)
class Observed:
    """rules: how it may route, none of them excluded by the outputs. returns, keeps_dtype: see LayerSpec."""

    rules: list[TopKRule]
    returns: Returns
    keeps_dtype: bool


def observe(subject: Subject) -> Observed:
    """Runs the layer a few times and finds the one rule that gives its numbers.

    Raises:
        Undecided: with the present parameters several rules, or none, can be told from the output.
        Declined: no known rule gives these numbers.
    """
    with torch.no_grad():
        subject.layer.eval()
        subject.find_rank()
        _check_equal_tokens(subject)
        samples = [subject.tokens(seed) for seed in range(_SEEDS)]
        outputs = [subject.run(x_TM) for x_TM in samples]
        _check_train_mode(subject, samples[0], outputs[0])
        subject.layer.eval()
        rules = _find_rules(subject, torch.cat(samples), torch.cat(outputs))
        keeps_dtype = _keeps_dtype(subject, samples[0])
    return Observed(rules=rules, returns=subject.returns, keeps_dtype=keeps_dtype)


def _check_equal_tokens(subject: Subject) -> None:
    """Equal tokens all choose the same experts, so a layer with a capacity has to drop some of them."""
    y_TM = subject.run(subject.tokens(0)[:1].repeat(TOKENS, 1))
    error = relative_error(y_TM, y_TM[:1].expand_as(y_TM))
    if error > TOLERANCE[subject.parts.dtype]:
        reason = f"gives {TOKENS} equal tokens unequal outputs (a capacity?): relative error {error:.1e}"
        raise Declined("forward", reason)


def _check_train_mode(subject: Subject, x_TM: torch.Tensor, evaluated: torch.Tensor) -> None:
    subject.layer.train()
    first, second = subject.run(x_TM), subject.run(x_TM)
    tolerance = TOLERANCE[subject.parts.dtype]
    error = relative_error(second, first)
    if error > tolerance:
        raise Declined("forward", f"is random in train mode: two runs on one input differ by {error:.1e}")
    error = relative_error(first, evaluated)
    if error > tolerance:
        raise Declined("forward", f"computes something else in train mode: relative error {error:.1e}")


def _find_rules(subject: Subject, x_TM: torch.Tensor, y_TM: torch.Tensor) -> list[TopKRule]:
    tolerance = TOLERANCE[subject.parts.dtype]
    logits_TE = torch.cat([subject.logits(x_TM[i : i + TOKENS]) for i in range(0, len(x_TM), TOKENS)])
    outputs_TEM = subject.expert_outputs(x_TM)
    for what, tensor in ((subject.parts.router, logits_TE), (subject.parts.experts, outputs_TEM), ("forward", y_TM)):
        if not torch.isfinite(tensor).all():
            raise Undecided(what, "gives values that are not finite")
    if not y_TM.any():
        raise Undecided(subject.parts.experts, "give only zeros")

    errors, weights = _errors_of_all(logits_TE.double(), outputs_TEM, y_TM.double(), logits_TE.dtype)
    best = min(errors, key=lambda key: errors[key])
    if errors[best] > max(tolerance, _COARSE):
        if len(errors) < 4 * logits_TE.shape[1]:
            raise _no_clear_choice(subject)
        score, normalize, k = best
        nearest = TopKRule(k=k, score=score, normalize=normalize)  # type: ignore[arg-type]
        reason = f"is no known routing; the nearest, {nearest}, has a relative error of {errors[best]:.1e}"
        raise Declined("forward", reason)
    limit = max(tolerance, _COARSE, 3 * errors[best])
    fitting = [key for key, error in errors.items() if error <= limit]
    for other in fitting:
        if float((weights[other] - weights[best]).abs().max()) > _COARSE:
            raise Undecided("forward", f"could be {best} or {other} (score, normalized, k): the output does not tell")
    # The dictionary's order: of rules that coincide (k = E, or one expert normalised), softmax and normalised first.
    rules = _precise(fitting[0], logits_TE.dtype)
    rules = [rule for rule in rules if _clear_error(rule, logits_TE, outputs_TEM, y_TM) <= tolerance]
    if not rules:
        raise Declined("forward", f"rounds its weights in a way that could not be reproduced in {logits_TE.dtype}")
    return _settle_close_calls(subject, rules)


def _no_clear_choice(subject: Subject) -> Undecided:
    return Undecided(subject.parts.router, "gives equal logits to several experts, so its choice does not show")


def _errors_of_all(
    logits_TE: torch.Tensor, outputs_TEM: torch.Tensor, y_TM: torch.Tensor, dtype: torch.dtype
) -> tuple[Errors, dict[tuple[str, bool, int], torch.Tensor]]:
    """Of every (score, normalize, k): the worst token's relative error, and the weights [T, E] in order of rank.

    Sums over growing k are cumulative, so that trying all of them costs as much as trying one.
    """
    sorted_TE, order_TE = logits_TE.sort(dim=1, descending=True, stable=True)
    ranked_TEM = outputs_TEM.gather(1, order_TE.unsqueeze(2).expand_as(outputs_TEM))
    clear_TE = _clear(sorted_TE, dtype)
    scale_T1 = _scale(y_TM, dtype).unsqueeze(1)
    errors: Errors = {}
    weights: dict[tuple[str, bool, int], torch.Tensor] = {}
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "softmax": lambda values: values.softmax(dim=1),
        "sigmoid": torch.sigmoid,
    }
    for score, function in functions.items():
        score_TE = function(sorted_TE)
        sums_TEM = (score_TE.unsqueeze(2) * ranked_TEM).cumsum(dim=1)
        sizes_TE = (score_TE.unsqueeze(2) * ranked_TEM.abs()).cumsum(dim=1).amax(dim=2)
        totals_TE = score_TE.cumsum(dim=1)
        for normalize in (True, False):
            norm_TE = totals_TE if normalize else torch.ones_like(totals_TE)
            difference_TE = (sums_TEM / norm_TE.unsqueeze(2) - y_TM.unsqueeze(1)).abs().amax(dim=2)
            error_TE = difference_TE / torch.maximum(sizes_TE / norm_TE, scale_T1)
            for k in range(1, logits_TE.shape[1] + 1):
                clear_T = clear_TE[:, k - 1]
                if int(clear_T.sum()) < _SEEDS:
                    continue
                key = (score, normalize, k)
                errors[key] = float(error_TE[clear_T, k - 1].max())
                kept_TE = torch.where(torch.arange(logits_TE.shape[1], device=logits_TE.device) < k, score_TE, 0.0)
                weights[key] = kept_TE / norm_TE[:, k - 1 : k]
    return errors, weights


def _clear(sorted_TE: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[T, E] bool: is the k-th best logit, in column k-1, above the next by more than rounding to `dtype` can move?"""
    eps = torch.finfo(torch.float32 if dtype in WIDE else dtype).eps
    gap_TE = sorted_TE[:, :-1] - sorted_TE[:, 1:]
    clear_TE = gap_TE > 4 * eps * sorted_TE.abs().amax(dim=1, keepdim=True).clamp_min(1.0)
    return torch.cat([clear_TE, torch.ones_like(sorted_TE[:, :1], dtype=torch.bool)], dim=1)


def _precise(found: tuple[str, bool, int], dtype: torch.dtype) -> list[TopKRule]:
    """What is one rule on paper is several in finite precision."""
    score, normalize, k = found

    def rule(score_dtype: torch.dtype | None, ranked: str) -> TopKRule:
        return TopKRule(k=k, score=score, normalize=normalize, score_dtype=score_dtype, ranked=ranked)  # type: ignore[arg-type]

    if dtype in WIDE and score == "sigmoid":  # which saturates: scores of 1 are all the same
        return [
            rule(None, "logits"),
            rule(None, "scores"),
            rule(torch.float32, "logits"),
            rule(torch.float32, "scores"),
        ]
    if dtype == torch.float32:
        return [rule(None, "logits")]
    if dtype == torch.float64:
        return [rule(None, "logits"), rule(torch.float32, "logits"), rule(torch.float32, "scores")]
    return [rule(torch.float32, "logits"), rule(None, "logits"), rule(None, "scores")]


def _clear_error(rule: TopKRule, logits_TE: torch.Tensor, outputs_TEM: torch.Tensor, y_TM: torch.Tensor) -> float:
    """The rule's relative error, but for tokens whose choice is a matter of rounding."""
    error_T = _token_errors(rule, logits_TE, outputs_TEM, y_TM)
    clear_T = _clear(logits_TE.double().sort(dim=1, descending=True).values, logits_TE.dtype)[:, rule.k - 1]
    return float(error_T[clear_T].max()) if clear_T.any() else 0.0


def _token_errors(
    rule: TopKRule, logits_TE: torch.Tensor, outputs_TEM: torch.Tensor, y_TM: torch.Tensor
) -> torch.Tensor:
    """[T]: the largest error of each token, relative to the largest of what is added up for it."""
    dense_TE = _dense(rule, logits_TE)
    guess_TM = torch.einsum("te,tem->tm", dense_TE, outputs_TEM)
    size_T = torch.einsum("te,tem->tm", dense_TE, outputs_TEM.abs()).amax(dim=1)
    return (guess_TM - y_TM.double()).abs().amax(dim=1) / torch.maximum(size_T, _scale(y_TM.double(), y_TM.dtype))


def _scale(y_TM: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[T]: each token's largest output, or where the dtype has few digits left."""
    return y_TM.abs().amax(dim=1).clamp_min(16 * torch.finfo(dtype).tiny)


def _dense(rule: TopKRule, logits_TE: torch.Tensor) -> torch.Tensor:
    """The rule's weights as [T, E] float64, zero where an expert was not chosen."""
    routing = rule.route(logits_TE)
    zeros = torch.zeros_like(logits_TE, dtype=torch.float64)
    return zeros.scatter(1, routing.expert_ids.long(), routing.weights.double())


def _settle_close_calls(subject: Subject, rules: list[TopKRule]) -> list[TopKRule]:
    """The rules that choose as the layer does where experts are nearly equal, and where the rules disagree."""
    k = rules[0].k
    if k == subject.parts.num_experts:
        return rules
    # Much of the pool has logits so close, or so large, that rounded scores cannot tell them apart.
    pool_TM = subject.tokens(_SEEDS, _POOL)
    pool_TM[::4] /= 8
    pool_TM[1::4] /= 64
    if rules[0].score == "sigmoid":
        pool_TM[2::4] *= 24
    logits_TE = subject.logits(pool_TM)
    sorted_TE = logits_TE.double().sort(dim=1, descending=True).values
    gap_T = sorted_TE[:, k - 1] - sorted_TE[:, k]
    chosen = [_dense(rule, logits_TE) > 0 for rule in rules]
    disagree_T = torch.stack([(other != chosen[0]).any(dim=1) for other in chosen]).any(dim=0)
    # Equal logits are left out: which of them wins is nobody's promise.
    urgency_T = torch.where(gap_T > 0, gap_T - disagree_T * gap_T.max(), math.inf)
    if not torch.isfinite(urgency_T.sort().values[TOKENS - 1]):
        raise _no_clear_choice(subject)
    x_TM = pool_TM[urgency_T.argsort()[:TOKENS]]
    y_TM, logits_TE, outputs_TEM = subject.run(x_TM), subject.logits(x_TM), subject.expert_outputs(x_TM)
    finite_T = torch.isfinite(y_TM).all(dim=1) & torch.isfinite(outputs_TEM).all(dim=2).all(dim=1)
    errors = [_token_errors(rule, logits_TE, outputs_TEM, y_TM)[finite_T] for rule in rules]
    worst = [float(error_T.max()) if error_T.numel() else 0.0 for error_T in errors]
    fitting = [rule for rule, error in zip(rules, worst) if error <= TOLERANCE[subject.parts.dtype]]
    if not fitting:
        reason = "chooses between nearly equal experts in a way that could not be reproduced"
        raise Declined(subject.parts.router, f"{reason}: relative error {min(worst):.1e}")
    return fitting


def _keeps_dtype(subject: Subject, x_TM: torch.Tensor) -> bool:
    """Under autocast, is the output of the input's dtype?"""
    if subject.parts.dtype != torch.float32:
        return False
    try:
        with torch.autocast(subject.parts.device.type, dtype=torch.bfloat16, cache_enabled=False):
            y = subject.call(subject.layer, x_TM.reshape(2, -1, x_TM.shape[1]) if subject.rank == 3 else x_TM)
    except Exception:  # the layer does not run under autocast at all: there is nothing to agree with
        return False
    return (y[0] if isinstance(y, tuple) else y).dtype == x_TM.dtype
