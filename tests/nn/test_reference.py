"""The graph pass against an implementation of one page: loops over nodes, dense matrices, nothing of this library."""

import pytest
import torch
from helpers.golden.make import Base
from torch import Tensor

from structlora_pyg import StructLoraConfig, get_structlora_model

TOP_K, THRESHOLD, SCALING = 2, 0.3, 2.0
GRADIENTS = {"edges": "hybrid", "top_k": TOP_K, "threshold": THRESHOLD}
FORMS = {
    "messages": {
        "encoding": {"kind": "exact"},
        "filter": {"kind": "hard_concrete", "noise": 0.0},
        "graph": GRADIENTS,
        "coordinator": {"conv": "GCNConv", "hidden_channels": 8, "lift": "tangent"},
    },
    "paper": {"preset": "paper", "encoding": {"kind": "exact"}, "graph": GRADIENTS},
    "default": {},
}


def reference(form: str, pairs: list[tuple[Tensor, Tensor]], cosine: Tensor, p: dict[str, Tensor]) -> dict:
    """Return what a form computes for layers A (r, d_in), B (d_out, r), two of which are a block."""
    nodes = [[i, i + 1] for i in range(0, len(pairs), 2)] if form == "paper" else [[i] for i in range(len(pairs))]
    n, kinds = len(nodes), 1 if form == "paper" else 2
    adjacency = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        nearest = sorted((j for j in range(n) if j != i), key=lambda j: -float(cosine[i, j]))[:TOP_K]
        for j in range(n):
            chain, block = abs(i - j) == kinds, i != j and i // 2 == j // 2
            if chain or (form == "default" and block):
                adjacency[i, j] = adjacency[j, i] = 1.0
            elif form != "default" and j in nearest and cosine[i, j] > THRESHOLD:
                adjacency[i, j] = adjacency[j, i] = max(float(adjacency[i, j]), float(cosine[i, j]))
    logits = 4.0 + 10.0 * p["offset"] if "offset" in p else torch.empty(0)
    gates = {
        "messages": lambda: (1.2 * torch.sigmoid(logits) - 0.1).clamp(0, 1),
        "paper": lambda: torch.sigmoid(logits),
        "default": lambda: torch.ones(n, pairs[0][0].size(0), dtype=torch.float64),
    }[form]()
    filtered = [(A, B * m) for (A, B), m in zip(pairs, gates.reshape(len(pairs), -1), strict=True)]
    codes = [
        (p[f"out_{B.size(0)}"].T @ (SCALING * B @ A) @ p[f"in_{A.size(1)}"]).flatten() for A, B in filtered
    ]  # (p, p) of every layer
    x = torch.stack([torch.cat([codes[i] for i in node]) for node in nodes])
    loops = adjacency + torch.eye(n, dtype=torch.float64)
    root = loops.sum(1).rsqrt()

    def conv(h: Tensor) -> Tensor:
        return (root[:, None] * loops * root) @ (h @ p["conv.weight"].T) + p["conv.bias"]

    def relative(h: Tensor) -> Tensor:
        return (h / (h.square().mean() + 1e-30).sqrt()) @ p["in.weight"].T + p["in.bias"]

    found = {"adjacency": adjacency, "gate": gates}
    if form == "default":  # updates stay; the network says how much noise their codes get in training
        size = x.norm(dim=1)
        depth = torch.arange(n, dtype=torch.float64) // 2 / (n // 2 - 1)
        size = (size / size.mean()).clamp(min=0.05).log()
        told = torch.stack([torch.ones_like(size), size, depth, p["agreement"]], dim=1)
        h = relative(torch.cat([told, torch.eye(2, dtype=torch.float64).repeat(n // 2, 1)], dim=1))
        differ = (h + torch.tanh(conv(h))) @ p["head.weight"].T + p["head.bias"]
        start = torch.logit(torch.tensor(0.5 / 2.5, dtype=torch.float64))
        level = 2.5 * torch.sigmoid(start + p["common"] + differ - differ.mean())
        return {**found, "x": x, "level": level.expand_as(gates), "update": [SCALING * B @ A for A, B in pairs]}
    if form == "paper":  # the message is added to the update at full strength
        message = torch.relu(conv(x))
        parts = message.view(len(pairs), 10, 10)
        updates = [SCALING * B @ A + C[: B.size(0), : A.size(1)] for (A, B), C in zip(filtered, parts, strict=True)]
    else:
        h = relative(x)
        delta = (h + torch.tanh(conv(h))) @ p["out.weight"].T + p["out.bias"]
        strength = torch.tanh(p["gain"]) * x.norm(dim=1, keepdim=True)
        message = strength * delta / delta.norm(dim=1, keepdim=True)
        updates = []
        for (A, B), C in zip(filtered, message.view(n, 10, 10) / SCALING, strict=True):
            C = C[: B.size(0), : A.size(1)] / (A.square().sum() + B.square().sum() + 1e-8)
            updates.append(SCALING * (B + C @ A.T) @ (A + B.T @ C))
    return {**found, "x": x + message, "message": message, "update": updates}


@pytest.mark.parametrize("form", FORMS)
def test_adjacency_gates_codes_messages_updates_levels_and_gradients_are_those_of_one_page(form: str) -> None:
    torch.manual_seed(0)
    base = Base()
    base.layers.extend(Base().layers)
    common = {"r": 3, "lora_alpha": 6, "target_modules": ["up", "down"], "schedule": {"warmup_steps": 0}}
    graph_pass = get_structlora_model(base.double(), StructLoraConfig(**common, **FORMS[form])).eval().graph_pass
    graph_pass = graph_pass.double().requires_grad_()
    pairs = [graph_pass.adapters.pair(a) for a in graph_pass.adapters]
    unit = torch.nn.functional.normalize(torch.rand(graph_pass.graph.num_nodes, 3, dtype=torch.float64), dim=1)
    if form != "default":
        graph_pass.graph.set_edges(unit @ unit.T)
    own: dict[str, Tensor] = {}
    network = graph_pass.coordinator
    parts = {"in": network.input} | ({"out": network.output} if form == "messages" else {})
    parts |= {"head": graph_pass.levels.head} if form == "default" else {}
    own |= {f"{name}.{side}": getattr(part, side) for name, part in parts.items() if form != "paper"
            for side in ("weight", "bias")}  # fmt: skip
    own |= {"conv.weight": network.convs[0].lin.weight, "conv.bias": network.convs[0].bias}
    own |= {"common": graph_pass.levels.common} if form == "default" else {"offset": graph_pass.stages[0].gate_offset}
    own |= {"gain": network.gain} if form == "messages" else {}
    with torch.no_grad():
        for parameter in [*(t for pair in pairs for t in pair), *own.values()]:
            parameter.normal_(0, 0.5)
        if form == "default":
            graph_pass.levels.agreement.uniform_(-1, 1)
        else:
            own["offset"].uniform_(-0.6, -0.2)
    copies = {name: p.detach().clone().requires_grad_() for name, p in own.items()}
    encoding = graph_pass.graph.encoding
    bases = {f"{side}_{d}": encoding.basis(side, d) for side in ("in", "out") for d in (6, 10)}
    given = {"agreement": graph_pass.levels.agreement} if form == "default" else {}
    twins = [(A.detach().clone().requires_grad_(), B.detach().clone().requires_grad_()) for A, B in pairs]
    want = reference(form, twins, unit @ unit.T, {**copies, **bases, **given})

    data, lifted = graph_pass()
    updates = {i: SCALING * b @ a for group, A, B in lifted for i, a, b in zip(group, A, B, strict=True)}
    n = data.num_nodes
    weight = data.edge_weight.double() if "edge_weight" in data else torch.ones(data.num_edges, dtype=torch.float64)
    close = {"atol": 1e-12, "rtol": 1e-12}
    dense = torch.zeros(n, n, dtype=torch.float64).index_put(tuple(data.edge_index), weight)
    torch.testing.assert_close(dense, want["adjacency"], **close)
    for name in {"gate", "x", "message", "level"} & want.keys():
        torch.testing.assert_close(data[name], want[name], **close)
    for i, update in enumerate(want["update"]):
        torch.testing.assert_close(updates[i], update, **close)
    weights = [torch.randn(u.shape, dtype=torch.float64) for u in want["update"]]
    drawn = torch.randn(want["gate"].shape, dtype=torch.float64)
    for made, level in ((updates, data.get("level", 0.0)), (want["update"], want.get("level", 0.0))):
        (sum((made[i] * w).sum() for i, w in enumerate(weights)) + (drawn * level).sum()).backward()
    for name, parameter in own.items():
        assert parameter.grad.abs().sum() > 0, name
        torch.testing.assert_close(parameter.grad, copies[name].grad, **close)
    for pair, twin in zip(pairs, twins, strict=True):
        for parameter, copy in zip(pair, twin, strict=True):
            torch.testing.assert_close(parameter.grad, copy.grad, **close)
