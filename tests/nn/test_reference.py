"""The graph pass against an implementation of one page: loops over nodes, dense matrices, nothing of this library."""

from __future__ import annotations

import torch
from helpers.golden.make import Base
from torch import Tensor

from structlora_pyg import StructLoraConfig, get_structlora_model

TOP_K, THRESHOLD, SCALING, WIDTH = 2, 0.3, 2.0, 10


def reference(pairs: list[tuple[Tensor, Tensor]], roles: list[int], cosine: Tensor, p: dict[str, Tensor]) -> dict:
    """Return adjacency, gates, code, message and new updates of layers A (r, d_in), B (d_out, r)."""
    n, eps = len(pairs), 1e-8
    adjacency = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        nearest = sorted((j for j in range(n) if j != i), key=lambda j: -float(cosine[i, j]))[:TOP_K]
        for j in range(n):
            later = [k for k in range(n) if roles[k] == roles[i] and k > i]
            if later[:1] == [j]:
                adjacency[i, j] = adjacency[j, i] = 1.0
            elif j in nearest and cosine[i, j] > THRESHOLD:
                adjacency[i, j] = adjacency[j, i] = max(float(adjacency[i, j]), float(cosine[i, j]))
    gates = (1.2 * torch.sigmoid(4.0 + 10.0 * p["offset"]) - 0.1).clamp(0, 1)
    filtered = [(A, B * m) for (A, B), m in zip(pairs, gates, strict=True)]
    x = torch.zeros(n, WIDTH, WIDTH, dtype=torch.float64)
    for i, (A, B) in enumerate(filtered):
        x = x + torch.nn.functional.pad(SCALING * B @ A, (0, WIDTH - A.size(1), 0, WIDTH - B.size(0)))[None] * (
            torch.arange(n) == i
        ).view(n, 1, 1)
    x = x.flatten(1)
    h = (x / (x.square().mean() + 1e-30).sqrt()) @ p["in.weight"].T + p["in.bias"]
    loops = adjacency + torch.eye(n, dtype=torch.float64)
    root = loops.sum(1).rsqrt()
    h = h + torch.tanh((root[:, None] * loops * root) @ (h @ p["conv.weight"].T) + p["conv.bias"])
    delta = h @ p["out.weight"].T + p["out.bias"]
    strength = torch.tanh(p["gain"]) * x.norm(dim=1, keepdim=True)
    message = strength * delta / delta.norm(dim=1, keepdim=True)
    updates = []
    for (A, B), C in zip(filtered, message.view(n, WIDTH, WIDTH) / SCALING, strict=True):
        C = C[: B.size(0), : A.size(1)] / (A.square().sum() + B.square().sum() + eps)
        updates.append(SCALING * (B + C @ A.T) @ (A + B.T @ C))
    return {"adjacency": adjacency, "gate": gates, "x": x + message, "message": message, "update": updates}


def test_adjacency_gates_codes_messages_updates_and_gradients_are_those_of_one_page() -> None:
    torch.manual_seed(0)
    config = StructLoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["up", "down"],
        encoding={"kind": "exact"},
        filter={"kind": "hard_concrete", "noise": 0.0},
        graph={"edges": "hybrid", "top_k": TOP_K, "threshold": THRESHOLD},
        coordinator={"conv": "GCNConv", "hidden_channels": 8, "lift": "tangent"},
        schedule={"warmup_steps": 0},
    )
    graph_pass = get_structlora_model(Base().double(), config).eval().graph_pass.double()
    filter_, coordinator = graph_pass.stages[0], graph_pass.stages[-1]
    pairs = [graph_pass.adapters.pair(a) for a in graph_pass.adapters]
    with torch.no_grad():
        for parameter in [*(t for pair in pairs for t in pair), coordinator.gain]:
            parameter.normal_(0, 0.5)
        filter_.gate_offset.uniform_(-0.6, -0.2)
    unit = torch.nn.functional.normalize(torch.rand(4, 3, dtype=torch.float64), dim=1)
    graph_pass.graph.set_edges(unit @ unit.T)
    parts = {"in": coordinator.input, "out": coordinator.output}
    own = {f"{name}.{side}": getattr(part, side) for name, part in parts.items() for side in ("weight", "bias")}
    own |= {"conv.weight": coordinator.convs[0].lin.weight, "conv.bias": coordinator.convs[0].bias}
    own |= {"gain": coordinator.gain, "offset": filter_.gate_offset}
    copies = {name: p.detach().clone().requires_grad_() for name, p in own.items()}
    twins = [(A.detach().clone().requires_grad_(), B.detach().clone().requires_grad_()) for A, B in pairs]
    want = reference(twins, [0, 1, 0, 1], unit @ unit.T, copies)

    data, lifted = graph_pass()
    updates = {i: SCALING * b @ a for group, A, B in lifted for i, a, b in zip(group, A, B, strict=True)}
    dense = torch.zeros(4, 4, dtype=torch.float64).index_put(tuple(data.edge_index), data.edge_weight.double())
    close = {"atol": 1e-12, "rtol": 1e-12}
    torch.testing.assert_close(dense, want["adjacency"], **close)
    for name in ("gate", "x", "message"):
        torch.testing.assert_close(data[name], want[name], **close)
    weights = [torch.randn(u.shape, dtype=torch.float64) for u in want["update"]]
    for i, update in enumerate(want["update"]):
        torch.testing.assert_close(updates[i], update, **close)
    sum((updates[i] * w).sum() for i, w in enumerate(weights)).backward()
    sum((u * w).sum() for u, w in zip(want["update"], weights, strict=True)).backward()
    for name, parameter in own.items():
        assert parameter.grad.abs().sum() > 0, name
        torch.testing.assert_close(parameter.grad, copies[name].grad, **close)
    for pair, twin in zip(pairs, twins, strict=True):
        for parameter, copy in zip(pair, twin, strict=True):
            torch.testing.assert_close(parameter.grad, copy.grad, **close)
