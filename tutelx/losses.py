"""Losses of whole models: distillation, and the competition of 1991; and the balance losses of gates, by their names.

T tokens or cases, V classes, E experts.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tutelx.errors import InvalidValueError
from tutelx.gates.losses import (
    communication_balance,
    cv_squared,
    device_balance,
    expert_balance,
    gshard_balance,
    importance,
    load,
    router_z,
    sequence_balance,
    switch_balance,
)

__all__ = [
    "communication_balance",
    "competition",
    "cv_squared",
    "device_balance",
    "distill",
    "expert_balance",
    "gshard_balance",
    "importance",
    "load",
    "posterior",
    "router_z",
    "sequence_balance",
    "staged",
    "switch_balance",
]


def distill(
    logits: torch.Tensor, teacher_logits: torch.Tensor, targets: torch.Tensor, *, teacher_share: float = 0.25
) -> torch.Tensor:
    """0.25 * cross-entropy with the teacher's probabilities + 0.75 * cross-entropy with the labels, mean over T.

    Switch Transformers, section 4.2. The teacher gets no gradient. Computed in float32 (float64 for float64 logits).

    Args:
        logits, teacher_logits: [T, V]. targets: [T] int64. teacher_share: of the teacher's term, in [0, 1].

    Raises:
        InvalidValueError: shapes that differ, or a share outside [0, 1].
    """
    if not 0 <= teacher_share <= 1:
        raise InvalidValueError(f"teacher_share={teacher_share} is outside [0, 1]")
    logits, teacher = _pair(logits, teacher_logits)
    soft = F.cross_entropy(logits, teacher.softmax(dim=-1))
    return teacher_share * soft + (1 - teacher_share) * F.cross_entropy(logits, targets)


def staged(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    step: int,
    stop_step: int,
    alpha: float = 1.0,
) -> torch.Tensor:
    """Cross-entropy + alpha * KL(teacher || student), mean over T; the KL term is 0 from `stop_step` on.

    Mixture-of-Students (DeepSpeed-MoE, section 4.2). The teacher gets no gradient, and after `stop_step` its logits
    are not looked at. Computed in float32 (float64 for float64 logits).

    Args:
        logits, teacher_logits: [T, V]. targets: [T] int64. step: counted from 0.
    """
    hard = F.cross_entropy(_wide(logits), targets)
    if step >= stop_step:
        return hard
    logits, teacher = _pair(logits, teacher_logits)
    divergence = F.kl_div(
        logits.log_softmax(dim=-1), teacher.log_softmax(dim=-1), reduction="batchmean", log_target=True
    )
    return hard + alpha * divergence


def competition(outputs: torch.Tensor, targets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """-log sum_i p_i * exp(-1/2 * ||y - E_i||^2), mean over T (Jacobs, Jordan, Nowlan and Hinton 1991, eq. 1.3).

    Every expert learns, in proportion to its share in the explanation: dL/dE_i = -h_i * (y - E_i) / T with h the
    posterior of :func:`posterior`, so experts specialise without a winner being picked. All experts run on all cases.

    Args:
        outputs: [T, E, M], what each expert says. targets: [T, M], y. logits: [T, E], p = softmax(logits).
    """
    return -torch.logsumexp(_joint(outputs, targets, logits), dim=1).mean()


def posterior(outputs: torch.Tensor, targets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """[T, E], h_i = p_i * exp(-1/2 * ||y - E_i||^2) over its sum: which expert explains a case, once y is known."""
    return _joint(outputs, targets, logits).softmax(dim=1)


def _joint(outputs: torch.Tensor, targets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """[T, E], log p_i - 1/2 * ||y - E_i||^2."""
    if outputs.dim() != 3 or outputs.shape[:2] != logits.shape or outputs.shape[::2] != targets.shape:
        shapes = f"outputs {tuple(outputs.shape)}, targets {tuple(targets.shape)}, logits {tuple(logits.shape)}"
        raise InvalidValueError(f"{shapes}: expected [T, E, M], [T, M] and [T, E]")
    distance = (_wide(targets).unsqueeze(1) - _wide(outputs)).square().sum(dim=2)
    return _wide(logits).log_softmax(dim=1) - 0.5 * distance


def _pair(logits: torch.Tensor, teacher_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if logits.shape != teacher_logits.shape:
        raise InvalidValueError(
            f"logits {tuple(logits.shape)} differ from teacher_logits {tuple(teacher_logits.shape)}"
        )
    return _wide(logits), _wide(teacher_logits.detach())


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float64 else values.float()
