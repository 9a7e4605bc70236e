"""What a step may cost: no waiting for the device, few operations, no second copy of anything."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from structlora_pyg import StructLoraConfig, get_structlora_model

FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "gates": {
        "filter": {"kind": "hard_concrete", "noise": 0.0},
        "coordinator": {"conv": "none"},
        "graph": {"edges": "none"},
    },
    "messages": {"filter": {"kind": "none"}, "coordinator": {"conv": "SAGEConv", "lift": "tangent"}},
}
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "item")  # sizes or values on the host


class Launches(TorchDispatchMode):
    """Counts operations, and refuses those for which a GPU would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        assert not name.startswith(WAITS), f"{name} waits for the device"
        assert not (name == "index" and any(getattr(i, "dtype", None) == torch.bool for i in args[1])), (
            "a mask as index"
        )
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns):
            self.count[name] += 1  # a view launches nothing
        return function(*args, **(kwargs or {}))


def trained(form: str, layers: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model that has taken the steps in which alarms listen."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers)))
    targets = [str(i) for i in range(layers)]
    config = StructLoraConfig(r=2, target_modules=targets, schedule={"warmup_steps": 0}, **FORMS[form])
    model = get_structlora_model(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(8):
        step(model)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def step(model: Any) -> None:
    (model(torch.ones(4, 16)).square().mean() + model.auxiliary_loss()).backward()


@pytest.mark.parametrize(("form", "fixed", "each"), [("default", 30, 24), ("gates", 120, 24), ("messages", 260, 24)])
def test_a_step_never_waits_for_the_device_and_launches_few_operations(form: str, fixed: int, each: int) -> None:
    counts = []
    for layers in (4, 12):
        model, optimizer = trained(form, layers)
        with Launches() as launches:
            step(model)
            model.hooks.after_step(optimizer)
        counts.append(launches.count.total())
    assert counts[0] <= fixed + 4 * each
    assert counts[1] - counts[0] <= 8 * each  # what a layer adds, that of its base included


def test_between_lessons_the_layers_run_with_their_own_parameters() -> None:
    model, _ = trained("default", 3)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        alive = model(torch.ones(4, 16)).sum()
    own = {p.data_ptr() for p in model.parameters()}
    assert [t.shape for t in kept if {*t.shape} == {2, 16} and t.data_ptr() not in own] == []  # no copy of a factor
    alive.backward()


def test_a_lesson_is_no_optimizer_step() -> None:
    model, optimizer = trained("default", 3)
    loss = lambda: model(torch.ones(4, 16)).square().mean()  # noqa: E731
    step(model)
    optimizer.step()
    model.teach(loss, loss)
    step(model)
    before = model.graph_pass.step
    step(model)
    assert model.graph_pass.step == before == 9
