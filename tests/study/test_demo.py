"""The demo runs, compares like with like, and proves what it exports."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from structlora_pyg.stage_config import CoordinatorConfig, FilterConfig
from structlora_pyg.study.demo import run as demo
from structlora_pyg.study.demo.models import RANK, accuracy, build, logits_of, structlora_config, train
from structlora_pyg.study.demo.run import Settings, run_demo
from structlora_pyg.study.tasks.digits import Digits, pretrained_vit, with_new_head
from structlora_pyg.tuner.model import get_structlora_model

TINY = Settings(seeds=2, steps=10, learning_rates=(0.01,), tuning_seeds=1, pretraining_steps=2)


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits.load()


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "structlora_pyg"


@dataclasses.dataclass
class Done:
    folder: Path
    results: dict[str, Any]
    printed: str
    bar: str
    same_random_state: bool


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("demo") / "runs" / "demo"
    printed, bar = io.StringIO(), io.StringIO()
    state = torch.get_rng_state()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(bar):
        results = run_demo(folder, quick=True)
    return Done(folder, results, printed.getvalue(), bar.getvalue(), bool((state == torch.get_rng_state()).all()))


def test_demo_writes_numbers_report_and_adapter(done: Done):
    assert json.loads((done.folder / "results.json").read_text()) == demo._without_nan(done.results)
    report = (done.folder / "report.html").read_text()
    assert report.count("<svg") == 6  # two of the four have a narrow twin
    gates = structlora_config(10).filter
    assert f"strong gates (beta {gates.beta:g}, init_logit {gates.init_logit:g})" in report
    assert {p.name for p in (done.folder / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_every_seed_is_run_with_both_methods(done: Done):
    for method in ("LoRA", "StructLoRA"):
        runs = done.results["runs"][method]
        assert [run["seed"] for run in runs] == [0, 1]
        assert all(0 <= run["accuracy"] <= 100 for run in runs)
        assert all(len(run["loss"]) == len(run["validation"]) == len(run["curve_steps"]) == 10 for run in runs)
    assert all(run["open_gates"] is None for run in done.results["runs"]["LoRA"])


def test_training_lowers_the_loss_of_both_methods(done: Done):
    for runs in done.results["runs"].values():
        assert all(run["loss"][-1] < run["loss"][0] for run in runs)


def test_both_methods_export_equally_many_parameters(done: Done):
    plain, ours = done.results["parameters"]["LoRA"], done.results["parameters"]["StructLoRA"]
    assert plain == {"adapter": 6 * 2 * 4 * (64 + 64), "head": 5 * 64 + 5, "training_only": 0}
    assert (ours["adapter"], ours["head"]) == (plain["adapter"], plain["head"])
    assert ours["training_only"] > 0


def test_each_method_chooses_from_the_same_grid(done: Done):
    for chosen in done.results["learning_rates"].values():
        assert [trial["lr"] for trial in chosen["trials"]] == [0.005, 0.01]
        best = max(chosen["trials"], key=lambda trial: (trial["accuracy"], -trial["loss"]))
        assert chosen["lr"] == best["lr"]


def test_two_seeds_are_never_called_better_without_a_small_p(done: Done):
    p = done.results["comparison"]["accuracy"]["p_t"]
    assert ("no difference shown" in done.results["verdict"]) == (not p < 0.05)


def test_demo_prints_table_verdict_proof_and_a_progress_bar(done: Done):
    for expected in ("Test accuracy, %", "Drift energy", "Open gates", "Time a step", done.results["verdict"]):
        assert expected in done.printed
    assert "identical predictions: yes" in done.printed
    assert "largest difference of logits" in done.printed
    assert "step/s" in done.bar


def test_demo_leaves_the_callers_random_numbers_alone(done: Done):
    assert done.same_random_state


def test_exported_adapter_scores_the_same_in_stock_peft(done: Done, digits: Digits):
    base = with_new_head(pretrained_vit(digits, done.results["settings"]["pretraining_steps"]), seed=99)
    loaded = PeftModel.from_pretrained(base, done.folder / "adapter")
    assert type(loaded) is PeftModel
    reached = accuracy(logits_of(loaded, digits.test), digits.test.y)
    assert reached == pytest.approx(done.results["runs"]["StructLoRA"][0]["accuracy"])


def test_new_head_travels_with_the_adapter(done: Done):
    state = load_file(done.folder / "adapter" / "adapter_model.safetensors")
    assert state["base_model.model.head.weight"].shape == (5, 64)
    assert not any("gate" in name or "graph_pass" in name for name in state)


def test_export_that_does_not_reproduce_the_model_is_an_error(tmp_path: Path, digits: Digits):
    base = pretrained_vit(digits, 2)
    model = build("StructLoRA", base, TINY.steps, seed=0)
    train(model, digits.draw(10, 0), 0.01, 10, 0, on_step=lambda: None)
    other_base = dataclasses.replace(TINY, pretraining_steps=1)
    with pytest.raises(RuntimeError, match="does not reproduce the trained model"):
        demo.prove_export(model, tmp_path, digits, other_base)


def test_stock_lora_is_structlora_without_filter_and_graph(digits: Digits):
    base, examples = pretrained_vit(digits, 2), digits.draw(10, 0)
    stock = build("LoRA", base, TINY.steps, seed=0)
    config = structlora_config(TINY.steps)
    config.filter, config.coordinator = FilterConfig(kind="none"), CoordinatorConfig(conv="none")
    with_head = with_new_head(base, 0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        off = get_structlora_model(with_head, config)
    for model in (stock, off):
        train(model, examples, 0.01, 10, 0, on_step=lambda: None)
    trained = {name: p for name, p in off.named_parameters() if p.requires_grad}
    assert {name for name, p in stock.named_parameters() if p.requires_grad} == set(trained)
    for name, p in stock.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p, trained[name], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(logits_of(stock, examples), logits_of(off, examples), rtol=1e-3, atol=1e-4)


def test_stock_lora_adapts_q_and_v_only(digits: Digits):
    model = build("LoRA", pretrained_vit(digits, 2), TINY.steps, seed=0)
    train(model, digits.draw(10, 0), 0.01, 10, 0, on_step=lambda: None)
    b = model.get_base_model().blocks[0].attn.qkv.lora_B["default"].weight.detach()
    assert b[:64, :RANK].ne(0).all()
    assert b[128:, RANK:].ne(0).all()
    assert b[64:128].eq(0).all()
    assert b[:64, RANK:].eq(0).all()
    assert b[128:, :RANK].eq(0).all()


def test_both_methods_start_from_the_same_numbers(digits: Digits):
    base = pretrained_vit(digits, 2)
    plain, ours = (build(method, base, TINY.steps, seed=3) for method in demo.METHODS)
    values = dict(ours.named_parameters())
    for name, p in plain.named_parameters():
        assert torch.equal(p, values[name]), name


def test_parts_of_the_digits_do_not_overlap(digits: Digits):
    parts = (digits.pool, digits.validation, digits.test)
    assert [len(part) for part in (digits.known, *parts)] == [901, 298, 150, 448]
    pool, validation, test = ({x.numpy().tobytes() for x in part.x} for part in parts)
    assert len(pool | validation | test) == len(pool) + len(validation) + len(test)


def test_draw_gives_as_many_examples_of_every_class_as_asked_for(digits: Digits):
    chosen = digits.draw(10, seed=5)
    assert torch.bincount(chosen.y).tolist() == [10] * 5
    assert torch.equal(digits.draw(10, seed=5).x, chosen.x)
    assert not torch.equal(digits.draw(10, seed=6).x, chosen.x)
    pool = {x.numpy().tobytes() for x in digits.pool.x}
    assert all(x.numpy().tobytes() in pool for x in chosen.x)


def test_validation_has_the_same_number_of_every_class(digits: Digits):
    assert torch.bincount(digits.validation.y).tolist() == [30] * 5


@pytest.mark.parametrize("per_class", [0, 1000])
def test_draw_of_too_many_or_no_examples_is_refused(digits: Digits, per_class: int):
    with pytest.raises(ValueError, match="per_class must be in"):
        digits.draw(per_class, seed=0)


def test_pretrained_model_comes_from_the_cache_the_second_time(digits: Digits, cache: Path):
    counted: list[int] = []
    first = pretrained_vit(digits, 3, lambda: counted.append(1))
    second = pretrained_vit(digits, 3, lambda: counted.append(1))
    assert len(counted) == 3
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not [p for p in cache.iterdir() if p.suffix == ".tmp"]


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty", "another model"])
def test_damaged_cache_is_found_out_and_built_again(digits: Digits, tmp_path: Path, monkeypatch, caplog, damage: str):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    good = pretrained_vit(digits, 1).state_dict()
    (file,) = (tmp_path / "structlora_pyg").iterdir()
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "one bit":
        content[-1] ^= 1
    elif damage == "empty":
        content.clear()
    else:
        content = content.replace(b"head.bias", b"tail.bias")
    file.write_bytes(content)
    rebuilt = pretrained_vit(digits, 1).state_dict()
    assert "is damaged" in caplog.text
    assert all(torch.equal(rebuilt[name], value) for name, value in good.items())
    caplog.clear()
    pretrained_vit(digits, 1)
    assert "damaged" not in caplog.text


def test_cache_that_cannot_be_written_is_no_obstacle(digits: Digits, tmp_path: Path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    pretrained_vit(digits, 1)
    assert "cannot be kept" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": 1}, "seeds must be >= 2"),
        ({"steps": 5}, "steps must be >= 10"),
        ({"learning_rates": ()}, "learning_rates must be positive"),
        ({"learning_rates": (0.1, -1.0)}, "learning_rates must be positive"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_written(tmp_path: Path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run_demo(tmp_path / "demo", **arguments)
    assert not (tmp_path / "demo").exists()
