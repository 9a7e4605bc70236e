"""LoRA + Cos and LoRA + Laplacian against dense updates, by hand and by finite differences."""

from __future__ import annotations

import pytest
import torch
from helpers.adapted import adapt, randomise, train
from helpers.tiny import ARCHITECTURES, logits
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from structlora_pyg import adapter_structure
from structlora_pyg.study.methods.penalties import CosinePenalty, LaplacianPenalty


class Stack(nn.Module):
    """Three blocks of two square layers a (3 x 3) and b (3 x 3), and one layer of another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)}) for _ in range(3))
        self.end = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block["b"](torch.tanh(block["a"](x))))
        return self.end(x)


def stack(targets: tuple[str, ...] = ("a", "b"), **options) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": list(targets), **options})
    model = get_peft_model(Stack().double(), config, autocast_adapter_dtype=False)
    randomise(model)
    return model


def dense(model: PeftModel) -> dict[str, Tensor]:
    """Return the flattened dense update of every layer."""
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    return {n: m.get_delta_weight("default").flatten().double() for n, m in layers.items()}


def unit(model: PeftModel, name: str, vector: list[float]) -> None:
    """Make a layer's update s * e_0 vector^T."""
    layer = model.get_base_model().get_submodule(name)
    with torch.no_grad():
        layer.lora_A["default"].weight.zero_()
        layer.lora_B["default"].weight.zero_()
        layer.lora_A["default"].weight[0] = torch.tensor(vector)
        layer.lora_B["default"].weight[0, 0] = 1.0


def test_cosine_penalty_by_hand() -> None:
    model = stack(("a",))
    for i, vector in enumerate([[1.0, 0, 0], [0, 2.0, 0], [0, -3.0, 0]]):
        unit(model, f"blocks.{i}.a", vector)
    # Cosines 0 and -1: (1 - 0 + 1 + 1) / 2.
    torch.testing.assert_close(CosinePenalty(model)(), torch.tensor(1.5, dtype=torch.float64))


def test_laplacian_penalty_by_hand() -> None:
    model = stack(("a",))
    for i, vector in enumerate([[1.0, 0, 0], [0, 2.0, 0], [0, -3.0, 0]]):
        unit(model, f"blocks.{i}.a", vector)
    # s = 3: squared distances 9 (1 + 4) and 9 * 25; mean squared norm 9 (1 + 4 + 9) / 3.
    torch.testing.assert_close(LaplacianPenalty(model)(), torch.tensor(270.0 / 42, dtype=torch.float64))


def test_both_penalties_agree_with_dense_updates_role_by_role() -> None:
    model = stack(("a", "b", "end"))
    u = dense(model)
    pairs = [(u[f"blocks.{i}.{n}"], u[f"blocks.{i + 1}.{n}"]) for n in "ab" for i in range(2)]
    cosine = sum(1 - nn.functional.cosine_similarity(x, y, dim=0) for x, y in pairs) / 2
    distance = sum((x - y).square().sum() for x, y in pairs)
    mean = sum(x.square().sum() for x in u.values()) / 7
    torch.testing.assert_close(CosinePenalty(model)(), cosine)
    torch.testing.assert_close(LaplacianPenalty(model)(), distance / mean)
    assert float(LaplacianPenalty(model)().detach()) == pytest.approx(adapter_structure(model).relative_drift)


@pytest.mark.parametrize("make", [CosinePenalty, LaplacianPenalty])
def test_gradients_are_those_of_finite_differences(make) -> None:
    model = stack(("a", "b"), r=1)
    penalty = make(model)
    parameters = [p for n, p in model.named_parameters() if "lora_" in n]
    penalty().backward()
    for p in parameters:
        numeric = torch.empty_like(p)
        for i in range(p.numel()):
            with torch.no_grad():
                old = p.view(-1)[i].item()
                values = []
                for h in (1e-6, -1e-6):
                    p.view(-1)[i] = old + h
                    values.append(float(penalty()))
                p.view(-1)[i] = old
                numeric.view(-1)[i] = (values[0] - values[1]) / 2e-6
        torch.testing.assert_close(p.grad, numeric, rtol=1e-4, atol=1e-6)


def test_nothing_is_nan_where_updates_are_zero() -> None:
    model = get_peft_model(Stack(), LoraConfig(r=2, target_modules=["a", "b"]))  # lora_B is 0
    for make, want in ((CosinePenalty, 2.0), (LaplacianPenalty, 0.0)):
        model.zero_grad()
        value = make(model)()
        value.backward()
        assert float(value.detach()) == want
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for n, p in model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("make", [CosinePenalty, LaplacianPenalty])
def test_training_with_the_penalty_makes_neighbours_alike_and_without_does_not(make) -> None:
    tiny = ARCHITECTURES["llama"]
    batch = tiny.batch()
    cosines = []
    for weight in (0.0, 1.0):
        model = get_peft_model(tiny.model(), LoraConfig(r=2, lora_alpha=4, target_modules=tiny.targets)).train()
        penalty = make(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        torch.manual_seed(0)
        for _ in range(40):
            (model(**batch).loss + weight * penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
        cosines.append(adapter_structure(model).adjacent_cosine)
    assert cosines[1] > cosines[0] + 0.3


@pytest.mark.parametrize("name", ["llama", "timm_vit_slices", "pyg_transformer"])
def test_of_a_structlora_model_the_coordinated_factors_are_compared(name: str) -> None:
    tiny = ARCHITECTURES[name]
    model = train(adapt(tiny), tiny.batch(), steps=4, lr=5e-2)
    with torch.no_grad():
        value = float(LaplacianPenalty(model, tiny.slices)())
    assert value == pytest.approx(adapter_structure(model).relative_drift, rel=1e-4)
    model.train()
    logits(model, tiny.batch())
    CosinePenalty(model, tiny.slices)().backward()
    touched = [n for n, p in model.graph_pass.named_parameters() if p.grad is not None]
    assert any("gate" in n for n in touched), "the penalty does not reach the filter"


def test_a_penalty_without_effect_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to compare"):
        CosinePenalty(stack(("end",)))
