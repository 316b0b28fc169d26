"""Distillation and the competition of 1991, against numbers worked by hand; and the example that trains a mixture."""

import math
import runpy
from pathlib import Path

import pytest
import torch

from tests.cases import tensor
from tests.gates.hand import F64, log
from tutelx import losses

approx = pytest.approx
LN = math.log


def test_distill_by_hand():
    # Student (1/2, 1/2), teacher (3/4, 1/4): cross-entropy ln 2 with anything. With student (1/4, 3/4), label 0:
    # teacher term -(3/4 ln 1/4 + 1/4 ln 3/4), hard term -ln 1/4.
    teacher, labels = log([0.75, 0.25]), torch.tensor([0])
    assert losses.distill(log([0.5, 0.5]), teacher, labels).item() == approx(LN(2))
    soft, hard = -(0.75 * LN(0.25) + 0.25 * LN(0.75)), -LN(0.25)
    assert losses.distill(log([0.25, 0.75]), teacher, labels).item() == approx(0.25 * soft + 0.75 * hard)
    assert losses.distill(log([0.25, 0.75]), teacher, labels, teacher_share=1.0).item() == approx(soft)


def test_staged_stops():
    # KL((3/4, 1/4) || (1/2, 1/2)) = 3/4 ln 3/2 + 1/4 ln 1/2; cross-entropy ln 2.
    student, teacher, labels = log([0.5, 0.5]), log([0.75, 0.25]), torch.tensor([1])
    divergence = 0.75 * LN(1.5) + 0.25 * LN(0.5)
    for step, expected in ((0, LN(2) + 2 * divergence), (9, LN(2) + 2 * divergence), (10, LN(2)), (11, LN(2))):
        value = losses.staged(student, teacher, labels, step=step, stop_step=10, alpha=2.0)
        assert value.item() == approx(expected)


def test_the_teacher_gets_no_gradient():
    student, teacher = tensor(3, 5, dtype=F64, grad=True), tensor(3, 5, dtype=F64, seed=1, grad=True)
    labels = torch.tensor([0, 3, 4])
    assert torch.autograd.gradcheck(lambda s: losses.distill(s, teacher, labels), student)
    assert torch.autograd.gradcheck(lambda s: losses.staged(s, teacher, labels, step=0, stop_step=1), student)
    losses.distill(student, teacher, labels).backward()
    assert teacher.grad is None


def test_competition_by_hand():
    # p = (1/2, 1/2), y = 0, experts say 0 and 2: -log(1/2 * 1 + 1/2 * e^-2).
    outputs, y, gate = torch.tensor([[[0.0], [2.0]]], dtype=F64), torch.zeros(1, 1, dtype=F64), log([0.5, 0.5])
    assert losses.competition(outputs, y, gate).item() == approx(-LN(0.5 + 0.5 * math.exp(-2)))
    h = losses.posterior(outputs, y, gate)[0]
    assert h.tolist() == approx([1 / (1 + math.exp(-2)), math.exp(-2) / (1 + math.exp(-2))])


def test_every_expert_gets_gradient_by_its_posterior():
    outputs, y = tensor(4, 3, 2, dtype=F64, grad=True), tensor(4, 2, dtype=F64, seed=1)
    gate = tensor(4, 3, dtype=F64, seed=2, grad=True)
    losses.competition(outputs, y, gate).backward()
    h = losses.posterior(outputs, y, gate).detach()
    expected = -h.unsqueeze(2) * (y.unsqueeze(1) - outputs.detach()) / 4
    assert torch.allclose(outputs.grad, expected)
    assert (outputs.grad.abs().sum(2) > 0).all(), "not only the winner's"
    assert torch.allclose(gate.grad, (gate.detach().softmax(1) - h) / 4)
    assert torch.autograd.gradcheck(losses.competition, (outputs, y, gate))


def test_far_experts_do_not_overflow():
    far = torch.full((1, 2, 3), 1e4, requires_grad=True)
    value = losses.competition(far, torch.zeros(1, 3), torch.zeros(1, 2))
    assert value.item() == approx(0.5 * 3e8)
    value.backward()
    assert far.grad.isfinite().all()


def test_low_precision_is_computed_in_float32():
    logits = tensor(4, 7, dtype=torch.bfloat16)
    assert losses.distill(logits, logits, torch.zeros(4).long()).dtype == torch.float32
    assert losses.competition(logits.view(4, 7, 1), logits[:, :1], logits).dtype == torch.float32


def test_bad_input():
    with pytest.raises(ValueError, match="teacher_share=2 is outside"):
        losses.distill(log([0.5, 0.5]), log([0.5, 0.5]), torch.tensor([0]), teacher_share=2)
    with pytest.raises(ValueError, match=r"logits \(1, 2\) differ from teacher_logits \(1, 3\)"):
        losses.distill(log([0.5, 0.5]), log([0.5, 0.3, 0.2]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"expected \[T, E, M\], \[T, M\] and \[T, E\]"):
        losses.competition(torch.zeros(2, 3, 4), torch.zeros(2, 5), torch.zeros(2, 3))


def test_the_example_learns_one_line_an_expert():
    example = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "mixture.py"))
    experts, gate, curve = example["train"](steps=400)
    assert curve[-1] < 0.2 * curve[0]
    lines = sorted(zip(experts.weight[:, 0].tolist(), experts.bias.tolist()))
    assert lines == [(approx(-3, abs=0.3), approx(-4, abs=0.4)), (approx(2, abs=0.3), approx(4, abs=0.4))]
    left = gate(torch.tensor([[-1.0]])).argmax().item()
    assert experts.weight[left].item() > 0
