"""A mixture of experts in its first form: the competition of 1991 splits a task that no single expert can do.

The target is one line for x < 0 and another for x > 0. Two linear experts and a linear gate learn it together;
`tutelx.losses.competition` gives every expert gradient in proportion to its posterior, and each ends with one line.

    python examples/mixture.py
"""

import torch
from torch import nn

from tutelx import losses


def targets(x: torch.Tensor) -> torch.Tensor:
    """[T, 1] -> [T, 1]: 2x + 4 on the left, -3x - 4 on the right."""
    return torch.where(x < 0, 2 * x + 4, -3 * x - 4)


def train(steps: int = 800, seed: int = 0) -> tuple[nn.Linear, nn.Linear, list[float]]:
    """The experts (one output each), the gate, and the loss of every step."""
    torch.manual_seed(seed)
    experts, gate = nn.Linear(1, 2), nn.Linear(1, 2)
    optimizer = torch.optim.Adam([*experts.parameters(), *gate.parameters()], lr=0.05)
    curve = []
    for _ in range(steps):
        x = torch.rand(256, 1) * 4 - 2
        loss = losses.competition(experts(x).unsqueeze(2), targets(x), gate(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return experts, gate, curve


def main() -> None:
    experts, gate, curve = train()
    print(f"loss {curve[0]:.3f} -> {curve[-1]:.3f}")
    for e in range(2):
        side = "left" if gate(torch.tensor([[-1.0]])).argmax() == e else "right"
        print(f"expert {e}, on the {side}: {experts.weight[e, 0]:+.2f} x {experts.bias[e]:+.2f}")


if __name__ == "__main__":
    main()
