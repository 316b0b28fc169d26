"""The optimizer whose state is dealt out over ranks, against one process with all of it."""

import pytest
import torch
import torch.distributed as dist

from tests.cases import tensor
from tests.comm.test_failures import caught
from tutelx.integrations.tutel import net

STEPS = 4
SHAPES = [(3, 5), (), (4,), (7,), (2, 2)]  # not all divide by the ranks; the last belongs to the experts


def start() -> list[torch.Tensor]:
    params = [tensor(*shape, dtype=torch.float64, seed=n).requires_grad_() for n, shape in enumerate(SHAPES)]
    params[-1]._tutel_expert = True
    return params


def grad(rank: int, step: int, n: int) -> torch.Tensor | None:
    """The fourth parameter has a gradient on the last rank only, and none at all in the first step."""
    if n == 3 and (rank != 1 or step == 0):
        return None
    return tensor(*SHAPES[n], dtype=torch.float64, seed=100 * rank + 10 * step + n)


def trained(group, average):
    rank, params = dist.get_rank(group), start()
    kept = [param.data_ptr() for param in params]
    optimizer = net.TutelDistributedOptimizer(iter(params), group=group, average_shared=average)
    assert "call warp_local" in caught(optimizer.step)
    assert optimizer.warp_local(torch.optim.AdamW, lr=0.1) is optimizer
    for step in range(STEPS):
        optimizer.zero_grad()
        for n, param in enumerate(params):
            param.grad = grad(rank, step, n)
        if step == 2:  # as a checkpoint that is loaded late
            params[0].data.fill_(0.5)
        optimizer.step()
    assert kept == [param.data_ptr() for param in params], "the parameters stay where they are"
    elements = sum(state["exp_avg"].numel() for state in optimizer.local_optim.state.values())
    params[1].grad = torch.ones((), dtype=torch.float64)
    optimizer.zero_grad()
    assert params[1].grad == 0
    return [param.detach() for param in params], elements


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("members", [None, (0, 3)])
def test_against_one_process(ranks, average, members):
    answers = ranks(2 if members is None else 4).run(trained, average, ranks=members)
    for rank, (given, elements) in enumerate(answers):
        params = start()
        plain = torch.optim.AdamW(params, lr=0.1)
        for step in range(STEPS):
            for n, param in enumerate(params):
                both = [grad(r, step, n) for r in range(2)]
                if n == len(SHAPES) - 1:
                    param.grad = both[rank]
                else:
                    known = [each for each in both if each is not None]
                    param.grad = sum(known) / (2 if average else 1) if known else None
            if step == 2:
                params[0].data.fill_(0.5)
            plain.step()
        for one, other in zip(given, params, strict=True):
            torch.testing.assert_close(one, other.detach())
        # 15, 1, 4 and 7 elements in halves, rounded up, and the expert's 4.
        assert elements == 8 + 1 + 2 + 4 + 4


def test_one_process():
    params = start()
    optimizer = net.TutelDistributedOptimizer(params, average_shared=True).warp_local(torch.optim.SGD, lr=0.5)
    expected = [param.detach() - 0.5 for param in params]
    sum(param.sum() for param in params).backward()
    optimizer.step()
    for param, wanted in zip(params, expected):
        torch.testing.assert_close(param.detach(), wanted)
    with pytest.raises(TypeError, match="params holds a dict"):
        net.TutelDistributedOptimizer([{"params": params}])
