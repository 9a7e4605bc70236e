"""The formulas: codes, edges, gates, coordinator, lifts, structure."""

import math

import pytest
import torch
from helpers.adapted import adapt, full_config, train
from helpers.graphs import graph
from helpers.tiny import ARCHITECTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Bernoulli, kl_divergence
from torch_geometric.data import Data

from structlora_pyg import ConfigError, Coordinator, IBFilter, StructLoraConfig, adapter_structure, build_edges
from structlora_pyg.analysis.inspect import conv_reports
from structlora_pyg.analysis.structure import gram_matrix, stage_sizes
from structlora_pyg.data import Encoding
from structlora_pyg.data.encoding import update_code
from structlora_pyg.nn import OpenGates, RandomMask, TopKNorm
from structlora_pyg.nn.conv import edge_information
from structlora_pyg.nn.lift import ProjectLift, make_lift
from structlora_pyg.tuner.gradients import GradientSketch
from structlora_pyg.tuner.graph_pass import adapter_factors, truncate
from structlora_pyg.tuner.model import get_structlora_model

SHAPES = st.tuples(st.integers(1, 5), st.integers(2, 24), st.integers(2, 24), st.integers(0, 99))


def factors(n: int, r: int, d_in: int, d_out: int, seed: int = 0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, r, d_in, generator=g, dtype=dtype), torch.randn(n, d_out, r, generator=g, dtype=dtype)


@given(SHAPES)
@settings(max_examples=25, deadline=None)
def test_code_is_the_projection_of_the_dense_update(shape) -> None:
    r, d_in, d_out, seed = shape
    A, B = factors(3, r, d_in, d_out, seed)
    encoding = Encoding([d_in], [d_out], size=5, seed=seed).double()
    a, b = encoding.directions(A, B)
    code = update_code(a, b, torch.full((3, r), 2.0, dtype=A.dtype)).view(3, 5, 5)
    P = encoding.basis("in", d_in) * max(1.0, d_in / 5) ** 0.5
    Q = encoding.basis("out", d_out) * max(1.0, d_out / 5) ** 0.5
    torch.testing.assert_close(code, Q.T @ (2.0 * B @ A) @ P)


def test_exact_encoding_is_the_flattened_update() -> None:
    A, B = factors(2, 3, 5, 7)
    encoding = Encoding([5], [7], kind="exact").double()
    code = update_code(*encoding.directions(A, B), torch.ones(2, 3, dtype=A.dtype))
    torch.testing.assert_close(code.view(2, 7, 5), B @ A)


def test_sketched_inner_products_are_unbiased_and_their_error_falls_as_one_over_the_root_of_the_size() -> None:
    A, B = factors(3, 1, 256, 256)
    exact, sizes = gram_matrix(list(zip(A, B, strict=True))), (4, 8, 16, 32)
    errors = []
    for size in sizes:
        grams = []
        for seed in range(60):
            encoding = Encoding([256], [256], size=size, seed=seed).double()
            x = update_code(*encoding.directions(A, B), torch.ones(3, 1, dtype=A.dtype))
            grams.append(x @ x.T)
        error = torch.stack(grams) - exact
        assert (error.mean(0).abs() < 4 * error.std(0) / 60**0.5).all(), size
        errors.append(float(error.square().mean().sqrt()))
    slope = math.log(errors[-1] / errors[0]) / math.log(sizes[-1] / sizes[0])
    assert slope == pytest.approx(-0.5, abs=0.15)  # a little steeper: a subspace of 32 in 256 repeats little


def test_basis_is_orthonormal_and_regenerated_from_the_seed() -> None:
    one, two, other = (Encoding([40], [40], size=8, seed=s) for s in (1, 1, 2))
    P = one.basis("in", 40)
    torch.testing.assert_close(P.T @ P, torch.eye(8), atol=1e-6, rtol=0)
    assert torch.equal(P, two.basis("in", 40))
    assert not torch.allclose(P, other.basis("in", 40))
    assert not torch.allclose(P, one.basis("out", 40))
    assert not one.state_dict()


def test_sizes_of_the_stages_are_those_of_dense_updates() -> None:
    tiny = ARCHITECTURES["llama"]
    model = train(adapt(tiny), tiny.batch())
    with torch.no_grad():
        model.graph_pass.stages[0].gate_offset[::2, 0] = -0.4
        model.graph_pass.coordinator.gain.fill_(0.8)
    sizes, graph_pass = stage_sizes(model), model.graph_pass
    final, gates = adapter_factors(graph_pass)[0], model.adapter_graph().gate
    for i, adapter in enumerate(graph_pass.adapters):
        (A, B), (a, b) = graph_pass.adapters.pair(adapter), final[i]
        raw, filtered = B @ A, (B * gates[i]) @ A
        assert sizes["filter"][i] == pytest.approx(float((filtered - raw).norm() / raw.norm()), rel=1e-4, abs=1e-6)
        assert sizes["coordinator"][i] == pytest.approx(float((b @ a - filtered).norm() / filtered.norm()), rel=1e-4)
    assert max(sizes["filter"]) > 0.1
    assert min(sizes["coordinator"]) > 1e-3
    assert stage_sizes(adapt(tiny, filter={"noise": 0.5}))["level"] == pytest.approx([0.5] * len(final))


@given(SHAPES)
@settings(max_examples=25, deadline=None)
def test_gram_matrix_equals_the_dense_inner_products(shape) -> None:
    r, d_in, d_out, seed = shape
    A, B = factors(3, r, d_in, d_out, seed)
    dense = (B @ A).flatten(1)
    torch.testing.assert_close(gram_matrix(list(zip(A, B, strict=True))), dense @ dense.T, atol=1e-10, rtol=1e-10)


ROLE = torch.tensor([0, 1, 0, 1, 0, 1])  # q, v of three blocks
DEPTH = torch.tensor([0, 0, 1, 1, 2, 2])


def edges(kind: str, cosine=None, **options) -> set[tuple[int, int]]:
    edge_index, weight = build_edges(kind, DEPTH, ROLE, DEPTH, cosine, **options)
    assert edge_index.size(1) == weight.numel()
    assert ((weight >= 0) & (weight <= 1)).all()
    return {(int(i), int(j)) for i, j in edge_index.T}


def both(*pairs: tuple[int, int]) -> set[tuple[int, int]]:
    return {(i, j) for i, j in pairs} | {(j, i) for i, j in pairs}


def test_edge_sets_are_what_their_names_say() -> None:
    chain = both((0, 2), (2, 4), (1, 3), (3, 5))
    assert edges("depth_chain") == chain
    assert edges("same_block") == both((0, 1), (2, 3), (4, 5))
    assert len(edges("full")) == 30
    assert edges("none") == set()
    assert edges("hybrid") == chain
    assert edges("gradient") == chain  # until gradients are known
    assert len(edges("random")) == len(chain)
    assert edges("random", seed=1) == edges("random", seed=1) != edges("random", seed=2)


def test_gradient_edges_follow_cosines_threshold_and_top_k() -> None:
    cosine = torch.full((6, 6), -0.9)
    cosine[0, 5] = cosine[5, 0] = 0.8
    cosine[1, 2] = cosine[2, 1] = 0.2
    assert edges("gradient", cosine, threshold=0.3) == both((0, 5))
    assert edges("gradient", cosine) == both((0, 5), (1, 2))
    assert edges("hybrid", cosine, threshold=0.3) == both((0, 2), (2, 4), (1, 3), (3, 5), (0, 5))
    dense = torch.linspace(0.4, 0.9, 36).view(6, 6)
    dense = (dense + dense.T) / 2
    assert edges("gradient", dense, top_k=1) < edges("gradient", dense, top_k=3)


def test_cosines_that_are_not_numbers_make_no_edge() -> None:
    assert edges("gradient", torch.full((6, 6), float("nan"))) == set()


def test_gradients_of_small_layers_are_kept_as_they_are() -> None:
    tiny = ARCHITECTURES["gpt2_slices"]
    model = adapt(tiny, graph={"edges": "gradient", "refresh_every": 1}).double().train()
    batch = tiny.batch()
    for name, p in model.named_parameters():
        if "base_layer.weight" in name:
            p.requires_grad_(True)
    model(**batch).loss.backward()
    graph_pass = model.graph_pass
    for i, adapter in enumerate(graph_pass.adapters):
        layer = graph_pass.adapters.layers[adapter.layer]
        gradient = layer.base_layer.weight.grad.T[adapter.rows]  # Conv1D stores the transpose
        want = gradient.flatten().to(graph_pass.sketch.pending)
        assert graph_pass.sketch.error == 0
        torch.testing.assert_close(graph_pass.sketch.pending[i, : len(want)], want, rtol=1e-4, atol=1e-7)


def test_cosines_of_sketched_gradients_are_within_their_error_bar() -> None:
    torch.manual_seed(0)
    base = torch.nn.Sequential(*(torch.nn.Linear(96, 96) for _ in range(12)))
    model = get_structlora_model(base, full_config(r=2, target_modules=[str(i) for i in range(12)]))
    shared = torch.randn(96)  # as in real networks: of low rank, on one side nearly the same
    gradients = [torch.outer(torch.randn(96), shared + 0.3 * torch.randn(96)) for _ in range(12)]
    gradients[1] = gradients[0] + 0.5 * gradients[1]
    unit = torch.eye(96)
    want = torch.nn.functional.normalize(torch.stack(gradients).flatten(1), dim=1)
    wrong = []
    for seed in range(6):
        sketch = GradientSketch(model.graph_pass.adapters, seed=seed)
        for i, gradient in enumerate(gradients):
            sketch.add(i, gradient.T, unit)
        whole = sketch.pending[1].clone()
        for part in (slice(0, 40), slice(40, 96)):  # of a few tokens each
            sketch.add(1, gradients[1].T[part], -unit[part])
        assert sketch.pending[1].abs().max() < 1e-4 * whole.norm()
        sketch.pending[1] = whole
        assert sketch.finish()
        got = torch.nn.functional.normalize(sketch.average, dim=1)
        wrong.append((got @ got.T - want @ want.T)[~torch.eye(12, dtype=torch.bool)])
    assert 0 < sketch.error < 0.02
    assert torch.cat(wrong).square().mean().sqrt() < sketch.error
    assert torch.cat(wrong).abs().max() < 4 * sketch.error


def test_a_gradient_edge_exceeds_the_threshold_by_two_standard_errors() -> None:
    tiny = ARCHITECTURES["llama"]
    graph_pass = adapt(tiny, graph={"edges": "gradient", "threshold": 0.2}).graph_pass
    sketch = graph_pass.sketch
    sketch.average.zero_()
    sketch.average[:, :6] = torch.eye(6)
    sketch.average[1, :2] = torch.tensor([0.3, 0.91**0.5])  # cosine 0.3 with the first
    for error, count in ((0.0, 2), (0.04, 2), (0.06, 0)):
        sketch.error = error
        graph_pass.set_gradient_edges()
        assert graph_pass.graph.edge_index.size(1) == count, error


def test_edges_are_refreshed_on_schedule_and_only_then_hooks_are_active() -> None:
    tiny = ARCHITECTURES["llama"]
    model = adapt(tiny, graph={"edges": "gradient", "refresh_every": 3, "threshold": 0.0})
    train(model, tiny.batch(), steps=8)
    assert int(model.graph_pass.sketch.refreshes) == 3  # at steps 0, 3 and 6
    assert not model.graph_pass.sketch._handles


def test_hard_concrete_probability_matches_sampling() -> None:
    filter_ = IBFilter(torch.ones(200, 200), init_logit=-0.7).train()
    data = graph(2)
    gates, _ = filter_.gates(data)
    assert ((gates >= 0) & (gates <= 1)).all()
    want = float(filter_.probability_open()[0, 0])
    assert float((gates != 0).float().mean()) == pytest.approx(want, abs=0.01)


@pytest.mark.parametrize("logit", [-3.0, 0.0, 2.5])
@pytest.mark.parametrize("prior", [0.1, 0.5])
def test_gate_divergence_is_the_bernoulli_kl(logit: float, prior: float) -> None:
    filter_ = IBFilter(torch.ones(3, 4), init_logit=logit, prior=prior)
    want = kl_divergence(Bernoulli(logits=torch.tensor(logit)), Bernoulli(torch.tensor(prior)))
    torch.testing.assert_close(filter_.gates(graph(3, 4))[1], want)


def test_hard_gates_are_exactly_open_at_the_start_and_exactly_zero_when_closed_or_missing() -> None:
    filter_ = IBFilter(torch.tensor([[2.0, 2.0, 2.0], [2.0, 2.0, 0.0]])).eval()
    want = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])  # a direction that is missing stays closed
    assert torch.equal(filter_.gates(graph(2))[0] * (filter_(graph(2)).gate > 0), want)
    with torch.no_grad():
        filter_.gate_offset[0, 1] = -1.0
    assert float(filter_.gates(graph(2))[0][0, 1]) == 0.0


@pytest.mark.parametrize("make", [OpenGates, RandomMask, TopKNorm, IBFilter])
def test_filters_do_not_change_their_input_and_write_the_filtered_code(make) -> None:
    data = graph()
    before = {k: v.clone() for k, v in data.to_dict().items()}
    out = make(data.scaling)(data)
    assert out is not data
    assert "gate" not in data
    for key, value in before.items():
        assert torch.equal(data[key], value), key
    torch.testing.assert_close(out.x, update_code(data.code_A, data.code_B, out.gate * data.scaling))


def test_masks_keep_the_asked_share_and_top_k_keeps_the_largest() -> None:
    data = graph(5, 4)
    for filter_ in (RandomMask(data.scaling, keep=0.5), TopKNorm(data.scaling, keep=0.5)):
        assert torch.equal(filter_(data).gate.sum(1), torch.full((5,), 2.0))
    norm = data.code_A.norm(dim=-1) * data.code_B.norm(dim=-1)
    gate = TopKNorm(data.scaling, keep=0.25)(data).gate
    assert torch.equal(gate.argmax(1), norm.argmax(1))


def test_gate_noise_is_a_function_of_seed_and_step_alone() -> None:
    data = graph()
    filter_ = IBFilter(data.scaling, init_logit=0.0, seed=4)
    data.step = 7
    one = filter_(data).gate
    torch.rand(5)
    assert torch.equal(filter_(data).gate, one)
    data.step = 8
    assert not torch.equal(filter_(data).gate, one)


def test_information_penalty_closes_gates_that_carry_nothing() -> None:
    data = graph()
    filter_ = IBFilter(data.scaling, prior=0.05, init_logit=0.0)
    optimizer = torch.optim.Adam(filter_.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        filter_(data).kl.sum().backward()
        optimizer.step()
    assert float(torch.sigmoid(filter_.logits).mean()) == pytest.approx(0.05, abs=0.02)
    assert float(filter_.eval()(data).gate.max()) == 0.0


TESTED = ["GCNConv", "GATConv", "GATv2Conv", "SAGEConv", "GINConv", "TransformerConv", "GraphConv"]


def coordinator(conv="GCNConv", **options) -> Coordinator:
    torch.manual_seed(0)
    made = Coordinator(16, conv, hidden_channels=8, **options)
    with torch.no_grad():
        made.gain.fill_(0.7)
    return made.eval()


def all_types() -> Data:
    """A graph that carries everything that a convolution may ask for."""
    data = graph()
    data.edge_type, data.node_type = torch.arange(data.num_edges) % 4, torch.arange(6) % 2
    return data


def test_most_convolutions_work_by_name_and_every_refusal_gives_a_reason() -> None:
    reports = {report.name: report for report in conv_reports()}
    assert sum(report.works for report in reports.values()) >= 45
    assert all(reports[name].works for name in TESTED)
    for name, report in reports.items():
        assert report.works == (not report.reason)
        assert report.works or name in report.reason


def test_every_coordinator_is_equivariant_to_permutations_of_the_nodes() -> None:
    data, order, wrong = all_types(), torch.tensor([3, 0, 5, 1, 4, 2]), []
    moved = Data(x=data.x[order], edge_index=order.argsort()[data.edge_index], edge_weight=data.edge_weight)
    moved.edge_type, moved.node_type = data.edge_type, data.node_type[order]
    for report in conv_reports():
        if report.works:
            made = coordinator(report.name, num_layers=2, example=data)
            with torch.no_grad():
                if not torch.allclose(made(moved).x, made(data).x[order], atol=1e-5, rtol=1e-5):
                    wrong.append(report.name)
    assert wrong == []


@pytest.mark.parametrize("conv", TESTED)
def test_messages_arrive_only_along_edges(conv: str) -> None:
    data, made = graph(), coordinator(conv)
    data.edge_index, data.edge_weight = torch.tensor([[0], [1]]), torch.ones(1)
    with torch.no_grad():
        before = made(data).message
        changed = data.clone()
        changed.x = data.x.clone()
        changed.x[0] = data.x[0].flip(0)  # same norms, so that the common scale stays
        after = made(changed).message
    assert not torch.allclose(before[1], after[1])
    torch.testing.assert_close(before[2:], after[2:])


def test_edge_weights_have_an_effect_where_the_table_says_so() -> None:
    data, other, without = all_types(), all_types(), []
    other.edge_weight = data.edge_weight * torch.linspace(0.1, 1, data.num_edges)
    for report in conv_reports():
        if report.works and {"edge_weight", "edge_attr"} & {*report.edge_information}:
            made = coordinator(report.name, example=data)
            assert edge_information(made.convs[0], data)
            with torch.no_grad():
                if torch.allclose(made(data).x, made(other).x):
                    without.append(report.name)
    assert without == []


@pytest.mark.parametrize("conv", ["SAGEConv", "GINConv", "GCNConv"])
def test_every_convolution_works_by_name_and_the_log_says_what_it_makes_of_the_weights(conv: str, caplog) -> None:
    with caplog.at_level("INFO", logger="structlora_pyg"):
        model = train(adapt(ARCHITECTURES["llama"], coordinator={"conv": conv}), ARCHITECTURES["llama"].batch())
    graph = model.adapter_graph()
    assert "edge_weight" in graph
    assert graph.message.abs().sum() > 0
    used = "uses edge_weight" if conv == "GCNConv" else "uses nothing else of them; their weights are left out"
    assert [r.getMessage() for r in caplog.records] == [f"{conv} passes messages along the edges and {used}"]


def test_gain_zero_is_the_identity_and_the_message_never_exceeds_the_update() -> None:
    data, made = graph(), coordinator()
    with torch.no_grad():
        made.gain.fill_(100.0)
        out = made(data)
        assert (out.message.norm(dim=1) <= data.x.norm(dim=1) * (1 + 1e-5)).all()
        made.gain.fill_(0.0)
        assert torch.equal(made(data).x, data.x)


def test_zero_codes_give_zero_messages_and_finite_gradients() -> None:
    data, made = graph(), coordinator()
    data.x = torch.zeros_like(data.x).requires_grad_()
    out = made(data)
    out.x.sum().backward()
    assert float(out.message.abs().max()) < 1e-12
    assert torch.isfinite(data.x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in made.parameters() if p.grad is not None)


def test_convolutions_come_as_names_paths_classes_and_instances() -> None:
    import torch_geometric.nn as pyg_nn

    instance = pyg_nn.GATConv(8, 4, heads=3, edge_dim=1)
    for conv in ("GCN", "torch_geometric.nn.GCNConv", pyg_nn.GCNConv, instance):
        assert coordinator(conv)(graph()).x.shape == (6, 16)
    assert coordinator("GATConv", conv_kwargs={"heads": 4})(graph()).x.shape == (6, 16)
    twice = coordinator(instance, num_layers=2)
    assert twice.convs[0] is not twice.convs[1]


LIFTS = ["tangent", "project", "dense"]


def lift_inputs(n=3, r=2, d_in=12, d_out=10, p=4, seed=0):
    A, B = factors(n, r, d_in, d_out, seed)
    encoding = Encoding([d_in], [d_out], size=p).double()
    a, b = encoding.directions(A, B)
    g = torch.Generator().manual_seed(seed + 1)
    m = torch.rand(n, r, generator=g, dtype=A.dtype)
    C = torch.randn(n, p, p, generator=g, dtype=A.dtype)
    return A, B, m, a, b, C, encoding.basis("in", d_in), encoding.basis("out", d_out)


def lift(kind: str):
    torch.manual_seed(0)
    return make_lift(kind, 4, 4, 2).double()


@pytest.mark.parametrize("kind", LIFTS)
def test_without_a_message_a_lift_is_the_filtered_update(kind: str) -> None:
    A, B, m, a, b, C, P, Q = lift_inputs()
    new_A, new_B = lift(kind)(A, B, m, a, b, torch.zeros_like(C), P, Q)
    torch.testing.assert_close(new_B @ new_A, (B * m.unsqueeze(1)) @ A)


@pytest.mark.parametrize("kind", LIFTS)
def test_lifts_are_finite_with_finite_gradients_at_lora_b_zero(kind: str) -> None:
    A, B, m, a, b, C, P, Q = lift_inputs()
    B, C = torch.zeros_like(B).requires_grad_(), torch.zeros_like(C).requires_grad_()
    encoding = Encoding([12], [10], size=4).double()
    a, b = encoding.directions(A, B)
    new_A, new_B = lift(kind)(A, B, m, a, b, C, P, Q)
    (new_B @ new_A).sum().backward()
    assert torch.equal(new_B @ new_A, torch.zeros(3, 10, 12, dtype=A.dtype))
    assert torch.isfinite(B.grad).all()
    assert C.grad is None or torch.isfinite(C.grad).all()


def test_project_adds_what_the_row_space_can_hold_of_the_message() -> None:
    A, B, m, a, b, C, P, Q = lift_inputs()
    new_A, new_B = lift("project")(A, B, m, a, b, C, P, Q)
    onto = torch.linalg.pinv(A) @ A
    want = (B * m.unsqueeze(1)) @ A + Q @ C @ P.T @ onto
    torch.testing.assert_close(new_B @ new_A, want, atol=1e-5, rtol=1e-4)


def test_truncation_is_the_best_approximation_and_reports_its_error() -> None:
    A, B = factors(2, 5, 12, 10)
    new_A, new_B, error = truncate(A, B, 3)
    u, s, vh = torch.linalg.svd(B @ A)
    best = u[:, :, :3] * s[:, None, :3] @ vh[:, :3]
    torch.testing.assert_close(new_B @ new_A, best)
    want = (s[:, 3:].square().sum(1) / s.square().sum(1)).max().sqrt()
    assert error == pytest.approx(float(want))


def test_structure_of_identical_layers_is_full_coherence_without_drift() -> None:
    model = adapt(ARCHITECTURES["llama"], filter={"kind": "none"}, coordinator={"conv": "none"})
    with torch.no_grad():
        for layer in model.graph_pass.adapters.layers.values():
            layer.lora_A["default"].weight.fill_(0.1)
            layer.lora_B["default"].weight.fill_(0.2)
    found = adapter_structure(model)
    assert found.adjacent_cosine == pytest.approx(1.0)
    assert found.drift_energy == pytest.approx(0.0, abs=1e-9)


def test_structure_of_a_plain_peft_model_uses_its_own_factors() -> None:
    from peft import LoraConfig, get_peft_model

    tiny = ARCHITECTURES["gpt2"]
    stock = get_peft_model(
        tiny.model(), LoraConfig(r=2, lora_alpha=6, target_modules=tiny.targets, init_lora_weights=False)
    )
    found = adapter_structure(stock)
    layers = [m for m in stock.modules() if hasattr(m, "get_delta_weight") and "default" in m.lora_A]
    dense = torch.stack([m.get_delta_weight("default").flatten() for m in layers]).double()
    torch.testing.assert_close(found.gram, dense @ dense.T, rtol=1e-5, atol=1e-8)
    drift = float((dense[1:] - dense[:-1]).square().sum())
    assert found.drift_energy == pytest.approx(drift, rel=1e-5)
    assert not math.isnan(found.adjacent_cosine)


def test_a_lift_comes_by_its_dotted_path_too() -> None:
    class_path = "structlora_pyg.nn.lift.ProjectLift"
    assert isinstance(make_lift(class_path, 4, 4, 2), ProjectLift)
    model = adapt(ARCHITECTURES["llama"], coordinator={"lift": class_path})
    assert isinstance(model.graph_pass.lift, ProjectLift)
    with pytest.raises(ConfigError, match=r"lift='tangnt' is unknown.*Did you mean 'tangent'"):
        StructLoraConfig(coordinator={"lift": "tangnt"})
    assert StructLoraConfig(coordinator={"lift": "mine.Lift"}).foreign_code() == ["coordinator.lift=mine.Lift"]
