"""The examples of CONTRIBUTING.md work as they stand there, from a file of the name that they begin with."""

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.adapted import adapt, train
from helpers.tiny import ARCHITECTURES, logits
from peft import PeftModel

from structlora_pyg import StructLoraConfig
from structlora_pyg.study.config import DataConfig, MethodConfig, ModelConfig
from structlora_pyg.study.methods import METHODS, make_method
from structlora_pyg.study.tasks import TASKS, load_task

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
TINY = ARCHITECTURES["llama"]


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Return a function that imports the example under a heading; what it registers is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    registered = [(registry, dict(registry)) for registry in (METHODS, TASKS)]

    def load(heading: str) -> ModuleType:
        found = re.search(rf"^### {heading}\n.*?^```python\n# (\w+)\.py\n(.*?)^```", TEXT, flags=re.M | re.S)
        assert found, f"CONTRIBUTING.md has no example under {heading!r}"
        assert len([line for line in found[2].splitlines() if line.strip()]) <= 10, "an example has at most ten lines"
        (tmp_path / f"{found[1]}.py").write_text(found[2], encoding="utf-8")
        sys.modules.pop(found[1], None)
        return importlib.import_module(found[1])

    yield load
    for registry, before in registered:
        registry.clear()
        registry.update(before)


def test_a_method_trains_and_exports(example, tmp_path: Path) -> None:
    example("Add a method")
    config = StructLoraConfig(r=2, target_modules=TINY.targets)
    method = make_method(config, MethodConfig(name="small_lora"), total_steps=3)
    assert METHODS["small_lora"].summary == "LoRA with a penalty on the size of its factors"
    model = method.adapt(TINY.model(), lambda: None, lambda: None).train()
    optimizer, batch = method.optimizer(1e-2, 0.0), TINY.batch()
    for _ in range(3):
        loss = method.backward(lambda: model(**batch).loss, torch.Tensor.backward)
        optimizer.step()
        optimizer.zero_grad()
    assert 0 < method.losses()["auxiliary"] < float(loss)
    method.export(tmp_path / "adapter")
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(TINY.model(), str(tmp_path / "adapter")).eval()
        torch.testing.assert_close(logits(loaded, batch), logits(model.eval(), batch))


def test_a_task_is_read_and_learned(example, tiny_bert: Path, tmp_path: Path) -> None:
    example("Add a task")
    (tmp_path / "texts.csv").write_text("text\n" + "It rains.\nIT RAINS!\n" * 10)
    data = DataConfig(task="shouting", path=str(tmp_path / "texts.csv"), max_length=32)
    task = load_task(ModelConfig(path=str(tiny_bert)), data, seed=0)
    assert {label for _, label in task.train_set} == {0, 1}
    batch = task.collate(task.train_set[:4])
    task.loss(task.model.train(), batch).backward()
    assert set(task.evaluate(task.model, [batch])) == {"loss", "accuracy", "f1"}


def test_a_filter_acts_by_its_dotted_path(example) -> None:
    module = example("Add a filter")
    model = train(adapt(TINY, r=4, filter={"kind": "strongest.Strongest"}), TINY.batch())
    assert isinstance(model.graph_pass.stages[0], module.Strongest)
    gate = model.adapter_graph().gate
    assert gate.unique().tolist() == [0.0, 1.0]
    assert bool((gate.sum(-1) >= 1).all())


def test_a_lift_trains_by_its_dotted_path_and_the_export_holds_what_it_gave(example, tmp_path: Path) -> None:
    module = example("Add a lift")
    model = train(adapt(TINY, coordinator={"conv": "GCNConv", "lift": "stretch.Stretch"}), TINY.batch())
    assert isinstance(model.graph_pass.lift, module.Stretch)
    model.export(tmp_path / "adapter")
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(TINY.model(), str(tmp_path / "adapter")).eval()
        torch.testing.assert_close(logits(loaded, TINY.batch()), logits(model, TINY.batch()), atol=1e-5, rtol=1e-4)
