"""Checkpoints from one number of ranks to another, bit for bit, by the commands."""

import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from torch.nn import functional as F

from tests.checkpoints.test_convert import same
from tutelx.integrations.tutel.checkpoint import gather, layout, scatter
from tutelx.integrations.tutel.checkpoint.states import gather_states, scatter_state

MODEL, HIDDEN, OUT = 3, 8, 5
SPECIAL = [float("nan"), float("inf"), -0.0, 1e-45]


def layer(num_experts: int) -> dict[str, torch.Tensor]:
    """Every number is its own, and some are such that only bits compare."""
    shapes = {
        "batched_fc1_w": (num_experts, HIDDEN, MODEL),
        "batched_fc2_w": (num_experts, HIDDEN, OUT),
        "batched_fc1_bias": (num_experts, HIDDEN),
        "batched_fc2_bias": (num_experts, OUT),
        "own.bias": (num_experts, 1, HIDDEN),
        "W_fc1": (num_experts * MODEL * HIDDEN,),
    }
    values = {name: torch.arange(torch.Size(shape).numel()).float().view(shape) for name, shape in shapes.items()}
    values["batched_fc1_w"].view(-1)[:4] = torch.tensor(SPECIAL)
    values["own.bias"] = values["own.bias"].bfloat16()
    return values


def whole(num_experts: int) -> OrderedDict:
    state = OrderedDict({"embedding.weight": torch.arange(4.0)})
    for n, prefix in enumerate(("moe.", "layers.1.moe.")):
        state[prefix + "_num_global_experts"] = torch.tensor(num_experts)
        for name, value in layer(num_experts).items():
            state[f"{prefix}experts.{name}"] = value + n if value.dtype == torch.float32 else value
        state[prefix + "gates.0.wg.weight"] = torch.ones(num_experts, MODEL)
    return state


def by_hand(num_experts: int, world: int, rank: int) -> OrderedDict:
    """Experts dealt whole, or s slices of each along its hidden dimension; the bias of the output in padded slices."""
    state = whole(num_experts)
    for key in [key for key in state if ".experts." in key]:
        value = state[key]
        if num_experts >= world:
            state[key] = value.chunk(world)[rank]
            continue
        s = world // num_experts
        expert, part = divmod(rank, s)
        if key.endswith("W_fc1"):
            state[key] = value.view(num_experts, -1)[expert].chunk(s)[part]
        elif key.endswith("fc2_bias"):
            size = -(-OUT // s)
            state[key] = F.pad(value[expert], (0, size * s - OUT))[None, part * size : (part + 1) * size]
        else:
            dim = 2 if key.endswith("own.bias") else 1
            state[key] = value[expert : expert + 1].chunk(s, dim)[part]
    return state


@pytest.mark.parametrize(("num_experts", "world"), [(2, 1), (2, 2), (2, 4), (4, 2), (6, 3), (1, 4), (1, 8)])
def test_each_rank_by_hand(num_experts, world):
    parts = scatter_state(whole(num_experts), world)
    for rank, own in enumerate(parts):
        expected = by_hand(num_experts, world, rank)
        same(own, {key: expected[key] for key in own})
        assert all(value.untyped_storage().nbytes() == value.nbytes for value in own.values()), "memory of its own"
    states = [by_hand(num_experts, world, rank) for rank in range(world)]
    same(gather_states(states), whole(num_experts))


def test_slices_as_the_scatter_of_tutel_writes_them():
    """[E, H, M] of two experts on four ranks: half of the rows of one, as [H, M/2]."""
    shapes = {"batched_fc1_w": (2, 4, 6), "batched_fc2_w": (2, 4, 2), "batched_fc1_bias": (2, 4)}
    even = OrderedDict({"moe._num_global_experts": torch.tensor(2)})
    for name, shape in shapes.items():
        even[f"moe.experts.{name}"] = torch.arange(float(torch.Size(shape).numel())).view(shape)
    files = []
    for rank in range(4):
        own = OrderedDict(even)
        for key in [key for key in own if ".experts." in key]:
            rows = own[key][rank // 2].chunk(2)[rank % 2]
            own[key] = rows.reshape(*even[key].shape[1:-1], even[key].shape[-1] // 2)
        files.append(own)
    same(gather_states(files), even)
    early = [{"moe.experts.batched_fc1_w": torch.ones(3, 4, 2)}] * 2
    with pytest.raises(ValueError, match="which is not 1 experts"):
        gather_states(early, default_num_experts=1)


def test_2_1_4_1_by_command(tmp_path):
    folder = tmp_path / "states"
    folder.mkdir()
    for rank in range(2):
        bundle = {"epoch": 3, "nets": {"model": by_hand(2, 2, rank)}}
        torch.save(bundle, folder / f"{rank}-of-2.ckpt")
    names, all_in_one = str(folder / "{rank}-of-{size}.ckpt"), str(tmp_path / "all.ckpt")
    where = ["--namespace=nets/model"]
    module = "tutelx.integrations.tutel.checkpoint.gather"
    command = [sys.executable, "-m", module, f"--inputs={names}", "--input_size=2", "--output", all_in_one, *where]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"the experts of 2 ranks are in {all_in_one}\n"
    expected = {"epoch": 3, "nets": {"model": whole(2)}}
    same(torch.load(all_in_one), expected)
    wide = str(tmp_path / "for 4" / "{rank}.{size}")
    assert scatter.main([f"--outputs={wide}", "--output_size=4", "--input", all_in_one, *where]) == 0
    for rank in range(4):
        same(torch.load(tmp_path / "for 4" / f"{rank}.4"), {"epoch": 3, "nets": {"model": by_hand(2, 4, rank)}})
    again = str(tmp_path / "again")
    assert gather.main([f"--inputs={wide}", "--input_size=4", f"--output={again}", *where]) == 0
    same(torch.load(again), expected)
    single = str(tmp_path / "single")
    assert scatter.main([f"--input={again}", "--output_size=1", f"--outputs={single}", *where]) == 0
    same(torch.load(single), expected)


def test_a_layer_at_the_root_and_early_versions(caplog):
    ranks = [{"_num_global_experts": torch.tensor(2), "experts.w": torch.full((1, 2), float(r))} for r in range(2)]
    same(gather_states(ranks)["experts.w"], torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    early = [{"a.experts.w": torch.full((1, 2), float(r)), "shared": torch.tensor(float(r))} for r in range(2)]
    found = gather_states(early, default_num_experts=2)
    assert found["a._num_global_experts"] == 2
    assert found["a.experts.w"].tolist() == [[0, 0], [1, 1]]
    assert "rank 1 has another shared than rank 0, whose value is kept" in caplog.text


def test_what_is_refused(tmp_path, capsys):
    path = tmp_path / "all.ckpt"
    names = str(tmp_path / "{rank}")
    torch.save(whole(2), path)
    (tmp_path / "broken").write_bytes(b"nothing")
    torch.save({"a": object}, tmp_path / "code")
    torch.save([1], tmp_path / "list")
    torch.save({"w": torch.ones(1)}, tmp_path / "plain")

    def refused(command, *words):
        assert command.main(list(map(str, words))) == 2
        return capsys.readouterr().err

    def scattered(name, size, outputs=names, *more):
        return refused(scatter, "--input", tmp_path / name, "--output_size", size, "--outputs", outputs, *more)

    assert "neither of 2 experts and 3 ranks divides the other" in scattered("all.ckpt", 3)
    assert "size=0, expected at least 1" in scattered("all.ckpt", 0)
    assert "has no {rank}, so that 2 ranks would share one file" in scattered("all.ckpt", 2, "x")
    assert "is no file" in scattered("missing", 2)
    assert "broken' cannot be read: " in scattered("broken", 2)
    assert "code' cannot be read: " in scattered("code", 2)
    assert "the checkpoint is a list, expected a dictionary" in scattered("list", 2)
    assert "there is no key '_num_global_experts'" in scattered("plain", 2)
    assert "the checkpoint has no 'model', only 'embedding.weight'" in scattered(
        "all.ckpt", 2, names, "--namespace=model"
    )
    assert "'embedding.weight' is a Tensor, expected a dictionary" in scattered(
        "all.ckpt", 2, names, "--namespace=embedding.weight"
    )
    assert "does not divide among 16 ranks" in scattered("all.ckpt", 32)
    assert "'/proc/0' cannot be written" in scattered("all.ckpt", 2, "/proc/{rank}")
    assert not (tmp_path / "0").exists()
    states = [by_hand(2, 2, rank) for rank in range(2)]
    states[1].pop("moe.experts.W_fc1")
    torch.save(states[0], tmp_path / "in0")
    torch.save(states[1], tmp_path / "in1")
    torch.save({**states[0], "moe.experts.W_fc1": 3}, tmp_path / "in2")
    (tmp_path / "odd0").symlink_to(tmp_path / "in0")
    (tmp_path / "odd1").symlink_to(tmp_path / "in2")

    def gathered(name, size, *more):
        return refused(gather, "--inputs", tmp_path / name, "--input_size", size, "--output", tmp_path / "out", *more)

    assert "do not hold the same experts' tensors: 'moe.experts.W_fc1'" in gathered("in{rank}", 2)
    assert "moe.experts.W_fc1 is a int, expected torch.Tensor" in gathered("odd{rank}", 2)
    assert "has shape (1, 8, 3) on each of 1 ranks, which is not 2 experts" in gathered("in{rank}", 1)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"differs from rank to rank: \(\(1, 2\), 'float32'\) and \(\(1, 3\)"):
        layout.join("w", [torch.ones(1, 2), torch.ones(1, 3)], 2)
    with pytest.raises(ValueError, match="w has shape \\(3, 1\\), which is not 2 experts"):
        layout.split("w", torch.ones(3, 1), 2, 2)
