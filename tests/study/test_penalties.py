"""LoRA + Cos and LoRA + Laplacian against dense updates, by hand and by finite differences."""

from typing import Any

import pytest
import torch
from helpers.adapted import randomise
from helpers.tiny import ARCHITECTURES
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from structlora_pyg import ConfigError, StructLoraConfig, adapter_structure
from structlora_pyg.study.config import MethodConfig
from structlora_pyg.study.methods import make_method

NAMES = ("lora_cos", "lora_laplacian")


class Stack(nn.Module):
    """Three blocks of two square layers a (3 x 3) and b (3 x 3), and one layer of another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)}) for _ in range(3))
        self.end = nn.Linear(3, 2)


def adapted(name: str, base: nn.Module, targets: Any, weight: float = 1.0) -> Any:
    config = StructLoraConfig(r=2, lora_alpha=6, target_modules=targets)
    method = make_method(config, MethodConfig(name=name, weight=weight), total_steps=9)
    method.adapt(base, lambda: None, lambda: None).train()
    return method


def value(method: Any) -> float:
    return float(method.penalty().detach())


def dense(method: Any) -> dict[str, Tensor]:
    """Return the flattened dense update of every layer."""
    layers = {n: m for n, m in method.model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    return {n: m.get_delta_weight("default").flatten().double() for n, m in layers.items()}


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("lora_cos", 1.5),  # cosines 0 and -1: (1 - 0 + 1 + 1) / 2
        ("lora_laplacian", 270.0 / 42),  # s = 3: distances 9 (1 + 4) and 9 * 25; mean squared norm 9 (1 + 4 + 9) / 3
    ],
)
def test_the_penalties_by_hand(name: str, want: float) -> None:
    method = adapted(name, Stack(), ["a"])
    for i, vector in enumerate([[1.0, 0, 0], [0, 2.0, 0], [0, -3.0, 0]]):
        layer = method.model.get_base_model().get_submodule(f"blocks.{i}.a")
        with torch.no_grad():  # the update is s * e_0 vector^T
            layer.lora_A["default"].weight.zero_()[0] = torch.tensor(vector)
            layer.lora_B["default"].weight.zero_()[0, 0] = 1.0
    assert value(method) == pytest.approx(want)
    method.options.weight = 0.1
    assert value(method) == pytest.approx(0.1 * want)


def test_both_penalties_agree_with_dense_updates_role_by_role() -> None:
    methods = {name: adapted(name, Stack(), ["a", "b", "end"]) for name in NAMES}
    for method in methods.values():
        randomise(method.model)
    u = dense(methods["lora_cos"])
    pairs = [(u[f"blocks.{i}.{n}"], u[f"blocks.{i + 1}.{n}"]) for n in "ab" for i in range(2)]
    cosine = sum(1 - nn.functional.cosine_similarity(x, y, dim=0) for x, y in pairs) / 2
    distance, mean = sum((x - y).square().sum() for x, y in pairs), sum(x.square().sum() for x in u.values()) / 7
    assert value(methods["lora_cos"]) == pytest.approx(float(cosine))
    assert value(methods["lora_laplacian"]) == pytest.approx(float(distance / mean))
    relative_drift = adapter_structure(methods["lora_laplacian"].model).relative_drift
    assert value(methods["lora_laplacian"]) == pytest.approx(relative_drift)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    method = adapted(name, Stack(), ["a", "b"])
    u = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u: method.compare(u @ u.T, *method.pairs), u)


@pytest.mark.parametrize(("name", "want"), [("lora_cos", 2.0), ("lora_laplacian", 0.0)])
def test_nothing_is_nan_where_updates_are_zero(name: str, want: float) -> None:
    method = adapted(name, Stack(), ["a", "b"])  # lora_B is 0
    assert value(method) == want
    method.penalty().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for n, p in method.model.named_parameters() if "lora_" in n)


def test_training_with_the_penalty_makes_neighbours_alike_and_without_does_not() -> None:
    tiny, cosines = ARCHITECTURES["llama"], []
    batch = tiny.batch()
    for weight in (1e-9, 1.0):
        torch.manual_seed(0)
        method = adapted("lora_cos", tiny.model(), tiny.targets, weight)
        optimizer = method.optimizer(2e-2, 0.0)
        for _ in range(25):
            method.backward(lambda: method.model(**batch).loss, Tensor.backward)  # noqa: B023
            optimizer.step()
            optimizer.zero_grad()
        cosines.append(adapter_structure(method.model).adjacent_cosine)
    assert cosines[1] > cosines[0] + 0.3


def test_a_penalty_without_effect_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method.name=lora_cos has nothing to compare: .*; roles: end"):
        adapted("lora_cos", Stack(), ["end"])
