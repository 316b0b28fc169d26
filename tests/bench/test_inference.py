"""A layer without gradients, and skewed loads: what the rows of these benchmarks are made of."""

import torch

from tests.cases import Case
from tutelx.bench.shapes import Shape
from tutelx.bench.subjects import SUBJECTS
from tutelx.bench.subjects.route import ids_of
from tutelx.testing.cases import skewed_ids


def test_the_yardstick_reads_the_weights_of_the_experts_that_have_rows():
    subject = SUBJECTS["layer_inference"]
    shape = Shape(T=1, D=8, K=2, E=6, H=4)
    read = subject.reads(subject.make(shape, torch.float32))
    assert len(read) == 2 * 3
    assert sum(t.numel() * 4 for t in read) == 2 * 3 * 8 * 4 * 4
    # x and y besides
    assert subject.must_move(shape, 4) == 768 + 2 * 8 * 4


def test_the_fullest_expert_has_as_much_as_was_asked_for():
    # 64 tokens, 2 choices, 16 experts: 8 slots are the mean, 4 times that is 32.
    counts = torch.bincount(ids_of(Shape(T=64, D=8, K=2, E=16, H=4, S=4)).flatten(), minlength=16)
    assert counts[0] == counts.max() == 32
    assert counts.sum() == 128


def test_skewed_ids_are_distinct_within_a_token():
    ids = skewed_ids(Case(tokens=40, top_k=3, num_experts=8, dim=1), 40)
    assert all(len(set(row)) == 3 for row in ids.tolist())
    assert (ids == 0).sum() == 40
