"""The layer over gloo ranks against the reference with all experts: outputs, losses, every gradient."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from tests.tolerance import assert_close
from tests.tutel import reference
from tutelx.integrations.tutel import moe

M, H = 6, 8
ACTIVATIONS = {"relu": F.relu, "tanh": torch.tanh, "silu": F.silu}


@dataclass(frozen=True, kw_only=True)
class Case:
    """count: experts of a rank, negative for -count ranks an expert. tokens: of each rank. degree: adaptive_r."""

    count: int
    tokens: tuple[int, ...]
    degree: int = 1
    overlap: int = 1
    kind: str = "ffn"
    activation: str = "relu"
    out: int = M
    factor: float = 1.0
    top_k: int = 2
    before: bool = False
    bias: bool = True
    use_2dh: bool = False

    def num_experts(self, world: int) -> int:
        return self.count * world if self.count > 0 else world // -self.count


@dataclass
class Answer:
    x: torch.Tensor
    y: torch.Tensor
    loss: torch.Tensor
    parameters: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    exchange: str


def run(group, cases) -> list[Answer]:
    torch.set_default_dtype(torch.float64)
    try:
        return [run_one(group, case) for case in cases]
    finally:
        torch.set_default_dtype(torch.float32)


def run_one(group, case: Case) -> Answer:
    rank = dist.get_rank(group)
    experts = {
        "type": case.kind,
        "num_experts_per_device": case.count,
        "hidden_size_per_expert": H,
        "activation_fn": ACTIVATIONS[case.activation],
    }
    if case.kind == "ffn":
        experts |= {"output_dim": case.out, "has_fc1_bias": case.bias, "has_fc2_bias": case.bias}
    layer = moe.moe_layer(
        {"type": "top", "k": case.top_k, "capacity_factor": case.factor},
        M,
        experts,
        group=group,
        seeds=(1, rank + 2, rank + 3),
        is_postscore=not case.before,
        use_2dh=case.use_2dh,
    )
    with torch.no_grad():
        for name, parameter in layer.experts.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
            elif case.kind != "ffn":
                parameter *= 30
    x = torch.randn(case.tokens[rank], M, requires_grad=True)
    y = layer(x, adaptive_r=case.degree, a2a_ffn_overlap_degree=case.overlap)
    assert (layer.adaptive_degree, layer.sharded_count) == (case.degree, max(1, -case.count))
    # With all weights gathered nothing travels that could be cut into chunks.
    assert layer.last_decision.plan.pipeline_degree == (case.overlap if case.degree else 1)
    (y.square().sum() + y.l_aux).backward()
    named = dict(layer.named_parameters())
    return Answer(
        x.detach(),
        y.detach(),
        y.l_aux.detach(),
        {name: p.detach() for name, p in named.items()},
        {"x": x.grad, **{name: p.grad for name, p in named.items()}},
        layer.last_decision.exchange,
    )


def whole(case: Case, parts: list[dict[str, torch.Tensor]], world: int) -> dict[str, torch.Tensor]:
    """The experts' tensors of all ranks put together."""
    s = max(1, -case.count)
    found = {}
    for name in parts[0]:
        if not name.startswith("experts."):
            continue
        tensors = [part[name] for part in parts]
        groups = [tensors[first : first + s] for first in range(0, world, s)]
        if case.kind == "llama_ffn":
            shape = (H, M) if name.endswith("3") else (M, H)
            numbers = math.prod(shape) * max(1, case.count)
            rows = [torch.cat(group)[:numbers].view(-1, *shape) for group in groups]
        else:
            rows = [torch.cat(group, dim=1) for group in groups]
        joined = torch.cat(rows)
        found[name.removeprefix("experts.")] = joined[:, : case.out] if name.endswith("fc2_bias") else joined
    return found


def check(case: Case, answers: list[Answer]) -> None:
    world = len(answers)
    weights = {n: w.requires_grad_() for n, w in whole(case, [a.parameters for a in answers], world).items()}
    activation = ACTIVATIONS[case.activation]
    if case.kind == "ffn":
        names = ("batched_fc1_w", "batched_fc2_w", "batched_fc1_bias", "batched_fc2_bias")
        experts = reference.feed_forward(*(weights.get(name) for name in names), activation)
    else:
        experts = reference.llama(*weights.values(), activation)
    E = case.num_experts(world)
    capacity = None
    if case.factor:
        # What the rank with the most tokens may send, in whole chunks and slices.
        alignment = max(1, -case.count) * case.overlap
        capacity = reference.rows_allowed(case.factor, max(case.tokens), min(case.top_k, E), E, alignment)
    gates, xs = [], []
    for a in answers:
        gate = a.parameters["gates.0.wg.weight"].clone().requires_grad_()
        x = a.x.clone().requires_grad_()
        gates.append(gate)
        xs.append(x)
        if len(x) == 0:
            assert a.y.shape == (0, case.out)
            continue
        y, loss = reference.layer(
            x, F.linear(x, gate), experts, top_k=min(case.top_k, E), capacity=capacity, before=case.before
        )
        assert_close(a.y, y, what=str(case))
        assert_close(a.loss, loss, what=str(case))
        (y.square().sum() + loss).backward()
    for a, x, gate in zip(answers, xs, gates):
        if len(x):
            assert_close(a.gradients["x"], x.grad, what=str(case))
            assert_close(a.gradients["gates.0.wg.weight"], gate.grad, what=str(case))
    for name, gradient in whole(case, [a.gradients for a in answers], world).items():
        assert_close(gradient, weights[name].grad, what=f"{name} of {case}")


def cases(world: int) -> list[Case]:
    tokens = {2: (3, 5), 4: (4, 5, 0, 3)}[world]
    kinds = [
        {},
        {"activation": "tanh", "out": 5},
        {"activation": "tanh", "out": 9, "factor": -0.6},
        {"kind": "llama_ffn", "activation": "silu", "factor": 0},
        {"kind": "llama_ffn", "activation": "tanh", "before": True},
        {"before": True, "bias": False, "factor": 0.5},
    ]
    found = []
    for count in (1, 2, -2, -world) if world > 2 else (1, 2, -2):
        s = max(1, -count)
        for n, kind in enumerate(kinds):
            for degree in [0, *(r for r in range(1, s + 1) if s % r == 0)]:
                found.append(Case(count=count, tokens=tokens, degree=degree, overlap=1 + n % 2, **kind))
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_every_degree(ranks, world):
    tried = cases(world)
    answers = ranks(world).run(run, tried)
    for n, case in enumerate(tried):
        check(case, [answer[n] for answer in answers])


def test_groups_of_some_ranks(ranks):
    """Experts sliced inside of a group that is not the world, where Tutel's gradients are not those of the group."""
    tried = [
        Case(count=-2, tokens=(3, 4), degree=r, kind=kind, activation="silu")
        for r in (0, 1, 2)
        for kind in ("ffn", "llama_ffn")
    ]
    both = ranks(4).run(run_in_halves, tried)
    for half in (both[:2], both[2:]):
        for n, case in enumerate(tried):
            check(case, [answer[n] for answer in half])


def run_in_halves(group, tried):
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return run(halves[dist.get_rank() // 2], tried)


def test_two_steps(ranks, monkeypatch):
    tried = [Case(count=1, tokens=(3, 4, 0, 2), use_2dh=True)]
    answers = [answer[0] for answer in ranks(4).run(run_on_nodes_of_two, tried)]
    check(tried[0], answers)
    assert answers[0].exchange == "2dh over 2 nodes of 2 ranks (LOCAL_WORLD_SIZE=2)"


def run_on_nodes_of_two(group, tried):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "2")
        return run(group, tried)


def one_differs(group, forward, own):
    layer = moe.moe_layer(
        {"type": "top", "k": 1}, M, {"type": "ffn", "count_per_node": -2, "hidden_size_per_expert": H}
    )
    try:
        layer(torch.randn(3, M), **(own if dist.get_rank() == 1 else forward))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"adaptive_r": 0}, "rank 1 has plan.shard_degree=0, rank 0 has plan.shard_degree=1"),
        ({"a2a_ffn_overlap_degree": 4}, "plan.pipeline_degree=4, rank 0 has plan.pipeline_degree=1"),
        ({"capacity_factor": 0.5}, "rank 1 has capacity_factor=0.5, rank 0 has capacity_factor=1.0"),
        ({"adaptive_r": 3}, "adaptive_r=3 is none of valid_rs=[0, 1, 2]"),
        ({"reserve_dims": 2}, "reserve_dims=2"),
    ],
)
def test_one_rank_that_asks_for_something_else(ranks, own, message):
    """An error on every rank, and none that waits."""
    answers = ranks(2).run(one_differs, {}, own)
    assert all(message in answer for answer in answers), answers


class OwnShardedExperts(torch.nn.Module):
    """Columns of one matrix an expert on each of s ranks, of which a call takes what the degree leaves to this rank."""

    def __init__(self, model_dim, num_experts_per_device, sharded_count):
        super().__init__()
        self.W = torch.nn.Parameter(torch.randn(num_experts_per_device, model_dim // sharded_count, model_dim))
        self.first = dist.get_rank() % sharded_count * self.W.shape[1]

    def forward(self, x, ctx):
        assert ctx.adaptive_degree == ctx.sharded_count == 2
        return x[:, :, self.first : self.first + self.W.shape[1]] @ self.W


def own_experts(group):
    layer = moe.moe_layer(
        {"type": "top", "k": 1, "capacity_factor": 0},
        M,
        {"type": "custom", "module": OwnShardedExperts, "num_experts_per_device": -2},
        seeds=(1, 2, 3 + dist.get_rank()),
        parallel_type="model",
        a2a_ffn_overlap_degree=2,
    )
    x = torch.randn(5, M)
    y = layer(x)
    y.sum().backward()
    return x, y.detach(), layer.experts.W.detach(), layer.experts.W.grad, layer.gates[0].wg.weight.detach()


def test_own_experts_in_slices(ranks):
    answers = ranks(2).run(own_experts)
    W = torch.cat([answer[2] for answer in answers], dim=1)[0].requires_grad_()
    total = 0
    for x, y, *_ in answers:
        wanted = x @ W  # one expert, whose one choice has the whole weight
        assert_close(y, wanted)
        total = total + wanted.sum()
    total.backward()
    assert_close(torch.cat([answer[3] for answer in answers], dim=1)[0], W.grad)


def planned(group):
    layer = moe.moe_layer(
        {"type": "top", "k": 1},
        M,
        {"type": "ffn", "count_per_node": -2, "hidden_size_per_expert": H},
        parallel_type="auto",
    )
    layer(torch.randn(200, M))
    many = layer.last_decision.plan.shard_degree
    layer(torch.randn(1, M))
    few = layer.last_decision.plan.shard_degree
    with pytest.raises(ValueError, match="holds 7 experts"):
        layer.load_state_dict({**layer.state_dict(), "_num_global_experts": torch.tensor(7)})
    shapes = [tuple(v.shape) for v in layer.state_dict().values()]
    return many, few, shapes, moe.moe_layer.global_expert_count(-2), moe.moe_layer.global_expert_count(0.5)


def test_what_sends_least(ranks):
    for many, few, shapes, *counts in ranks(2).run(planned):
        # 200 tokens are more than the 2 * 6 * 8 numbers of the expert, one is less.
        assert (many, few) == (0, 2)
        assert shapes == [(), (1, 4, 6), (1, 4, 6), (1, 4), (1, 3), (1, 6)]
        assert counts == [1, 1]


def routed(group):
    scores = torch.tensor([[0.9, 0.1]] * (2 + 3 * dist.get_rank()))
    needed = moe.top_k_routing(scores, 1, capacity_factor=0)[0][4]
    fixed = moe.top_k_routing(scores, 1, capacity_factor=1.0, inequivalent_tokens=True)[0][4]
    return needed, fixed


def test_capacities_that_ranks_share(ranks):
    # The fullest expert has 5 slots, and ceil(5 / 2) = 3.
    assert ranks(2).run(routed) == [(5, 3), (5, 3)]
