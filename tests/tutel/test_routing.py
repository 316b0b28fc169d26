"""The routing that scripts call themselves, against numbers worked by hand."""

import pytest
import torch

from tests.tolerance import assert_close
from tutelx.integrations.tutel import moe

# Five tokens, three experts. Best first: 0 1, 0 2, 1 2, 0 1, 2 0.
SCORES = torch.tensor(
    [[0.6, 0.3, 0.1], [0.7, 0.1, 0.2], [0.2, 0.5, 0.3], [0.8, 0.15, 0.05], [0.35, 0.25, 0.4]], dtype=torch.float64
)


def lists(tensors):
    return [tensor.tolist() for tensor in tensors]


def test_critical_data():
    (E, experts, locations, weights, capacity, asked), loss = moe.top_k_routing(SCORES, 2)
    assert E == 3
    assert lists(experts) == [[0, 0, 1, 0, 2], [1, 2, 2, 1, 0]]
    # Experts 0, 1 and 2 have 3, 1 and 1 first choices, behind which the second ones go on.
    assert lists(locations) == [[0, 1, 0, 2, 0], [1, 1, 2, 2, 3]]
    assert all(each.dtype == torch.int32 for each in (*experts, *locations))
    assert_close(weights[0], torch.tensor([6 / 9, 7 / 9, 5 / 8, 80 / 95, 40 / 75], dtype=torch.float64))
    # 2 * floor(1.0 * ceil(5/3)) = 4.
    assert capacity == 4
    assert asked.tolist() == [4, 3, 3]
    # 3 * (3/5 * 2.65/5 + 1/5 * 1.3/5 + 1/5 * 1.05/5).
    assert loss.item() == pytest.approx(3 * (3 * 2.65 + 1.3 + 1.05) / 25)
    ids, again = moe.get_topk_selection(moe.extract_critical(SCORES, 2)[0])
    assert ids.tolist() == [[0, 1], [0, 2], [1, 2], [0, 1], [2, 0]]
    assert again.tolist() == [4, 3, 3]


@pytest.mark.parametrize(
    ("factor", "alignment", "capacity"),
    [
        (1.0, 1, 4),
        (1.0, 3, 6),
        (1.4, 1, 4),
        (1.5, 1, 6),
        (0.4, 1, 2),  # floor(0.4 * 2) = 0: the balanced share asks for ceil(0.4 * 2 * 5 / 3)
        (0, 1, 4),
        (0, 3, 6),
        (-1.0, 1, 4),
        (-9.0, 1, 4),
        (-1.0, 3, 6),
    ],
)
def test_capacity(factor, alignment, capacity):
    critical, _ = moe.extract_critical(SCORES, 2, None, factor, alignment=alignment)
    assert critical[4] == capacity


def test_priority():
    # By best score: tokens 3, 1, 0, 2, 4.
    (_, _, locations, weights, _, _), loss = moe.extract_critical(
        SCORES, 2, None, batch_prioritized_routing=True, normalize_gate=False
    )
    assert lists(locations) == [[2, 1, 0, 0, 0], [2, 1, 2, 1, 3]]
    assert weights[1].tolist() == [0.3, 0.2, 0.3, 0.15, 0.35]
    assert loss is None


def test_one_choice_keeps_its_score():
    critical, _ = moe.top_k_routing(SCORES, 1)
    assert critical[3][0].tolist() == [0.6, 0.7, 0.5, 0.8, 0.4]
    assert len(moe.top_k_routing(SCORES, 9)[0][1]) == 3


def test_encode_and_decode():
    critical, _ = moe.extract_critical(SCORES, 2, None, 0.75)  # 2 * floor(0.75 * 2) = 2 rows
    x = torch.arange(1.0, 6.0, dtype=torch.float64).unsqueeze(1).repeat(1, 3).requires_grad_()
    rows = moe.fast_encode(x, critical)
    # Expert 0 gets tokens 0 and 1; 1 gets 2 and then 0; 2 gets 4 and then 1.
    assert rows[:, :, 0].tolist() == [[1, 2], [3, 1], [5, 2]]
    y = moe.fast_decode(rows, critical)
    kept = torch.tensor([1, 1, 5 / 8, 0, 40 / 75], dtype=torch.float64)
    assert_close(y, x * kept[:, None])
    y.sum().backward()
    assert_close(x.grad, kept[:, None].expand(5, 3))
    before = moe.fast_encode(x, critical, is_postscore=False)
    assert_close(before[0, :, 0], torch.tensor([6 / 9, 14 / 9], dtype=torch.float64))
    assert_close(moe.fast_decode(before, critical, False), y)
    assert moe.get_reversed_sample_ids(critical).tolist() == [[0, 1], [2, 0], [4, 1]]
    assert moe.get_reversed_sample_ids(critical, "top_id").tolist() == [[0, 0], [0, 1], [0, 1]]


def test_gradients():
    def run(scores, x):
        critical, loss = moe.extract_critical(scores, 2, capacity_factor=0.75)
        return moe.fast_decode(moe.fast_encode(x, critical).tanh(), critical), loss

    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (SCORES.clone().requires_grad_(), x))


def test_dispatcher():
    critical, _ = moe.top_k_routing(SCORES, 2, capacity_factor=0)
    dispatcher = moe.fast_dispatcher(num_global_experts=3, capacity=7, model_dim=4, dispatch_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="update"):
        dispatcher.encode(torch.ones(5, 4))
    dispatcher.update(*critical[1:4], is_postscore=True)
    rows = dispatcher.encode(torch.ones(5, 4).bfloat16())
    assert rows.shape == (21, 4)
    assert rows.dtype == torch.bfloat16
    assert dispatcher.decode(rows).float().sum().item() == pytest.approx(20.0, abs=0.1)
    dispatcher.update(*critical[1:4], capacity=2)
    assert dispatcher.encode(torch.ones(5, 4)).shape == (6, 4)


def test_cumulated_mask():
    mask = torch.tensor([[1, 0], [0, 1], [1, 0]])
    assert moe.fast_cumsum_sub_one(mask).tolist() == [[0, -1], [0, 0], [1, 0]]
    with pytest.raises(ValueError, match=r"dim=1"):
        moe.fast_cumsum_sub_one(mask, dim=1)


def test_without_a_token():
    critical, loss = moe.top_k_routing(torch.empty(0, 3), 2, capacity_factor=0)
    rows = moe.fast_encode(torch.empty(0, 4), critical)
    assert rows.shape == (3, 1, 4)
    assert not rows.any()
    assert moe.fast_decode(rows, critical).shape == (0, 4)
    assert loss.item() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.ones(5)}, "expected .T, E."),
        ({"top_k": 0}, "top_k=0"),
        ({"capacity_factor": float("nan")}, "factor=nan"),
        ({"capacity_factor": "much"}, "capacity_factor='much'"),
        ({"alignment": 0}, "alignment=0"),
        ({"scores": torch.full((5, 3), float("nan"))}, "nan is not a number"),
    ],
)
def test_refused(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        moe.extract_critical(**{"scores": SCORES, "top_k": 2, **change})


@pytest.mark.parametrize(
    ("experts", "locations", "message"),
    [
        ([0, 3], [0, 0], "an expert 0..3 is outside 0..2"),
        ([0, 0], [1, 1], "two slots have one location"),
        ([0, 0], [-1, 0], "a location -1..0"),
    ],
)
def test_refused_critical_data(experts, locations, message):
    given = [torch.tensor(experts)], [torch.tensor(locations)], [torch.ones(2)], 2
    with pytest.raises(ValueError, match=message):
        moe.fast_encode(torch.ones(2, 4), (3, *given, None))


def test_an_unknown_kind_of_ids():
    with pytest.raises(ValueError, match="'other'"):
        moe.get_reversed_sample_ids(moe.top_k_routing(SCORES, 2)[0], "other")
