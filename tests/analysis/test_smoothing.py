"""The Dirichlet energy is the quadratic form of the Laplacian, and is recorded layer by layer."""

import json

import pytest
import torch
from helpers.adapted import adapt, train
from helpers.graphs import graph
from helpers.tiny import ARCHITECTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.utils import to_dense_adj

from structlora_pyg import Coordinator
from structlora_pyg.analysis.stages import dirichlet_energy, layer_energies
from structlora_pyg.analysis.structure import StructureRecorder


def dense_energy(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """tr(X^T L X) with the normalised Laplacian of W + I."""
    n = len(x)
    looped = weights + torch.eye(n, dtype=x.dtype)
    root = looped.sum(1).rsqrt().diag()
    return (x.T @ (torch.eye(n, dtype=x.dtype) - root @ looped @ root) @ x).trace()


@given(st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_energy_is_the_quadratic_form_of_the_dense_laplacian(n: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(n, n, generator=g, dtype=torch.float64) * (torch.rand(n, n, generator=g) < 0.5)
    one_way = weights.nonzero().T
    x = torch.randn(n, 3, generator=g, dtype=torch.float64)
    want = dense_energy(x, (weights + weights.T) / 2)  # an edge one way counts half both ways
    torch.testing.assert_close(dirichlet_energy(x, one_way, weights[tuple(one_way)]), want)
    relative = dirichlet_energy(x, one_way, weights[tuple(one_way)], relative=True)
    torch.testing.assert_close(relative, want / x.square().sum())
    torch.testing.assert_close(dirichlet_energy(7 * x, one_way, weights[tuple(one_way)], relative=True), relative)
    assert 0 <= relative < 2
    assert dirichlet_energy(0 * x, one_way, relative=True) == 0


def test_the_energies_of_a_coordinator_are_those_of_its_features() -> None:
    data = graph()
    coordinator = Coordinator(data.x.size(1), conv="GCNConv", num_layers=3, hidden_channels=8)
    found = layer_energies(coordinator, data)
    weights = to_dense_adj(data.edge_index, edge_attr=data.edge_weight)[0]
    h = coordinator.input(data.x / data.x.square().mean().sqrt()).detach()
    for k in range(4):
        assert found[k] == pytest.approx(float(dense_energy(h, weights) / h.square().sum()), rel=1e-4)
        if k < 3:
            h = (h + torch.tanh(coordinator.convs[k](h, data.edge_index, data.edge_weight))).detach()


def test_smoothing_by_many_layers_is_seen() -> None:
    data, kwargs = graph(8), {"conv": "LGConv", "num_layers": 12, "hidden_channels": 8, "residual": False}
    energies = layer_energies(Coordinator(data.x.size(1), **kwargs), data)
    assert energies[-1] < 0.2 * energies[0]


def test_a_recorded_step_has_the_energies_of_what_the_coordinator_is_given() -> None:
    tiny = ARCHITECTURES["roberta"]
    model = train(adapt(tiny, coordinator={"conv": "GCNConv", "hidden_channels": 8, "num_layers": 2}), tiny.batch())
    coordinator = model.graph_pass.stages[-1]
    torch.nn.init.constant_(coordinator.gain, 3.0)
    given = []
    coordinator.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    step = StructureRecorder(model).read()
    json.dumps(step, allow_nan=False)
    assert len(step["dirichlet"]) == 3
    assert step["dirichlet"] == pytest.approx(layer_energies(coordinator, given[-1]), rel=1e-4)
    assert step["dirichlet"] != pytest.approx(layer_energies(coordinator, coordinator(given[-1])), rel=1e-2)
    without = train(adapt(tiny, coordinator={"conv": "none"}), tiny.batch())
    assert StructureRecorder(without).read()["dirichlet"] is None
