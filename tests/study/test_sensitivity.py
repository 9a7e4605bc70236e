"""Sensitivity-LoRA: calibration, scores and ranks against hand-computed values."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.tiny import ARCHITECTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from torch import nn

from structlora_pyg import ConfigError, StructLoraConfig
from structlora_pyg.study.config import MethodConfig
from structlora_pyg.study.methods import make_method
from structlora_pyg.study.methods.ranks import allocate_ranks, input_diagonals, metrics, sensitivity_scores


def test_metrics_are_trace_top_mean_and_effective_rank() -> None:
    # Sorted 4 3 2 1: shares 0.4, 0.7, 0.9; the top half is 4 and 3.
    assert metrics(torch.tensor([1.0, 4.0, 2.0, 3.0])) == (10.0, 3.5, 3)


def test_scores_follow_the_equations() -> None:
    diagonals = [torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([8.0, 0.0, 0.0, 0.0])]
    # S_g = 10, 8: mean 9, std 1, c = 1/81. S_T = 3.5, 4: mean 3.75, std 0.25, c = 0.25 / 14.0625.
    # S_E = 3, 1: mean 2, std 1, c = 1/4.
    c_T, c_E = 0.25 / 14.0625, 0.25
    S_l = [c_T * 3.5 + c_E * 3, c_T * 4 + c_E * 1]
    mean, std = (S_l[0] + S_l[1]) / 2, abs(S_l[0] - S_l[1]) / 2
    want = [10 / 81 + std / mean**2 * S_l[0], 8 / 81 + std / mean**2 * S_l[1]]
    assert sensitivity_scores(diagonals).tolist() == pytest.approx(want, rel=1e-12)


def test_bounds_hold_and_what_they_cut_goes_to_the_others_in_proportion() -> None:
    # Quotas of 48: 37, 6, 2, 1, 1, 1. At most 32: 5 more for the others, shared 6 : 2 : 1 : 1 : 1.
    assert allocate_ranks([37, 6, 2, 1, 1, 1], 48, [32] * 6) == [32, 9, 3, 2, 1, 1]
    # A share of 0.08 is raised to 1.
    assert allocate_ranks([100.0, 1.0], 8, [8, 8]) == [7, 1]
    same = [torch.tensor([2.0, 1.0]), torch.tensor([1.0, 2.0])]  # all three metrics agree
    assert sensitivity_scores(same).tolist() == [0.0, 0.0]  # what has no spread counts for nothing
    assert allocate_ranks([0.0, 0.0], 8, [16, 16]) == [4, 4]
    for total in (1, 9):
        with pytest.raises(ValueError, match=r"does not fit 2 weights.*it has to be in \[2, 8\]; change r"):
            allocate_ranks([1.0, 1.0], total, [4, 4])


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 40)), min_size=1, max_size=12), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_ranks_keep_total_bounds_and_order(weights, fill) -> None:
    scores, limits = [s for s, _ in weights], [limit for _, limit in weights]
    total = len(weights) + round(fill * (sum(limits) - len(weights)))
    ranks = allocate_ranks(scores, total, limits)
    assert sum(ranks) == total
    assert all(1 <= r <= limit for r, limit in zip(ranks, limits, strict=True))
    for i, a in enumerate(ranks):
        for j, b in enumerate(ranks):
            if scores[i] > scores[j] and b < limits[i]:
                assert a >= b, "a weight of higher score has a lower rank, and room for more"


class Tokens(nn.Module):
    """Two layers on (batch, tokens, 3), the second on flattened tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.idle = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(3, 3)

    def forward(self, x, attention_mask=None):
        return self.second(self.first(x).flatten(0, 1))


@pytest.mark.parametrize("positional", [False, True])
def test_padding_does_not_count_for_batched_and_for_flattened_tokens(positional) -> None:
    model = Tokens()
    x = torch.randn(2, 3, 3)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    call = (lambda: model(x, mask)) if positional else (lambda: model(x, attention_mask=mask))
    garbage = x.clone()
    garbage[mask == 0] = 1e6
    x, want = garbage, x[mask == 1].double()
    got = input_diagonals(model, ["first", "second"], call)
    torch.testing.assert_close(got["first"], 2 / 3 * want.square().sum(0))
    hidden = model.first(want.float()).double()
    torch.testing.assert_close(got["second"], 2 / 3 * hidden.square().sum(0), rtol=1e-5, atol=1e-6)


def test_calibration_is_in_eval_mode_without_gradients_and_leaves_no_trace() -> None:
    model = Tokens().train()
    model.second.eval()
    seen = []

    def calibrate() -> None:
        seen.append((model.training, torch.is_grad_enabled()))
        model(torch.randn(1, 2, 3))

    input_diagonals(model, ["first"], calibrate)
    assert seen == [(False, False)]
    assert (model.training, model.first.training, model.second.training) == (True, True, False)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_layers_that_never_run_and_values_that_are_not_finite_are_named() -> None:
    model, x = Tokens(), torch.randn(1, 2, 3)
    for names, call, said in (
        (["first", "idle"], lambda: model(x), "no tokens to idle"),
        (["first"], lambda: None, "no tokens to first"),
        (["first"], lambda: model(x, torch.zeros(1, 2)), "no tokens"),
        (["first"], lambda: model(x * math.nan), "inputs of first are not finite"),
    ):
        with pytest.raises(ValueError, match=said):
            input_diagonals(model, names, call)
    assert not any(m._forward_pre_hooks for m in model.modules()), "hooks stay after an error"


def ranks_of(base: nn.Module, calibrate: Callable[[], Any], **adapter) -> tuple[dict[str, int], set[float]]:
    """Return the rank of every adapted layer, and the scalings."""
    method = make_method(StructLoraConfig(**adapter), MethodConfig(name="sensitivity_lora"), total_steps=9)
    model = method.adapt(base, calibrate, lambda: None)
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    return {n: m.r["default"] for n, m in layers.items()}, {round(m.scaling["default"], 6) for m in layers.values()}


@pytest.mark.parametrize(
    ("name", "use_rslora"),
    [("llama", True), ("roberta", False), ("gpt2", True), ("timm_vit_slices", False), ("t5", False)],
)
def test_ranks_differ_add_up_and_keep_the_scaling(name: str, use_rslora: bool) -> None:
    tiny = ARCHITECTURES[name]
    model, batch = tiny.model(), tiny.batch()
    with torch.no_grad():  # a fresh norm makes the inputs of all layers alike
        for norm in (m for m in model.modules() if "norm" in type(m).__name__.lower() and hasattr(m, "weight")):
            norm.weight.mul_(torch.rand_like(norm.weight) * 3 * torch.rand(()))
    slices = len(tiny.slices or "1")
    options = {"target_modules": tiny.targets, "fused_slices": tiny.slices, "use_rslora": use_rslora}
    ranks, scalings = ranks_of(model, lambda: model(**batch), r=4, lora_alpha=8, **options)
    assert sum(ranks.values()) == 4 * slices * len(ranks)
    assert max(ranks.values()) <= 16 * slices
    assert len(set(ranks.values())) > 1, "the ranks are those of plain LoRA"
    assert scalings == {4.0 if use_rslora else 2.0}


def test_a_path_that_ends_like_another_keeps_its_own_rank() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(8, 8)
            self.inner = nn.ModuleDict({"q": nn.Linear(8, 8)})

        def forward(self, x):
            return self.inner["q"](100 * self.q(x))

    model = Twice()
    assert ranks_of(model, lambda: model(torch.randn(9, 8)), r=2, target_modules=["q"])[0] == {"q": 1, "inner.q": 3}


def test_layers_that_are_not_linear_are_refused() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(ConfigError, match="attention is a MultiheadAttention, not a linear layer"):
        ranks_of(model, lambda: None, r=2, target_modules=["attention"])
