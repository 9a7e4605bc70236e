import itertools
import json
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from helpers.runs import (
    MakeConfig,
    adapter_of,
    assert_identical,
    disk_that_fills,
    folder_of,
    interrupt,
    lines_of,
    tiny_config,
    without_dropout,
)
from helpers.slow import slow_but
from helpers.two_processes import launch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from structlora_pyg.checks import ConfigError
from structlora_pyg.study.run import Order, Run
from structlora_pyg.study.run_folder import CheckpointError
from structlora_pyg.study.tasks.sentences import SentenceTask
from structlora_pyg.study.train import DIVERGES, train
from structlora_pyg.tuner.alarms import AlarmWarning


@pytest.fixture(scope="module")
def finished(tiny_bert: Path, rte_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of six steps that was interrupted after checkpoint-4."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(tiny_config(tiny_bert, rte_folder, folder, max_steps=6))
    interrupt(folder, 4)
    return folder


def test_a_run_leaves_results_metrics_checkpoints_and_a_plain_adapter(make_config, rte_folder) -> None:
    config = make_config(eval_every=4, keep_checkpoints=2)
    results = train(config)
    folder = folder_of(config)
    assert {p.name for p in folder.iterdir()} == {
        ".lock", "config.json", "metrics.jsonl", "results.json", "adapter", "checkpoint-6", "checkpoint-8",
    }  # fmt: skip
    assert json.loads((folder / "results.json").read_text()) == results
    steps = [line for line in lines_of(config) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert [line["step"] for line in lines_of(config) if "evaluation" in line] == [4, 8]
    assert lines_of(config)[-1]["evaluation"] == results["metrics"]
    for line in steps:
        assert line["total"] == pytest.approx(line["loss"] + line["auxiliary"], rel=1e-5)
    assert steps[0]["auxiliary"] == 0.0 < steps[-1]["auxiliary"]
    assert results["parameters"]["heads"] == (2 * 16 + 2) + (16 * 16 + 16)  # classifier and pooler
    assert results["parameters"]["adapter"] == 2 * 2 * 2 * (16 + 16)
    assert {"torch", "peft", "structlora-pyg", "python"} <= results["versions"].keys()


def test_lessons_end_at_half_of_the_steps_and_do_not_look_at_what_was_just_trained_on(make_config, monkeypatch) -> None:
    trained, lessons = [], []

    gradients, losses_on = Run.gradients, Run.losses_on
    monkeypatch.setattr(Run, "gradients", lambda run, examples: trained.append(examples) or gradients(run, examples))
    monkeypatch.setattr(Run, "losses_on", lambda run, *parts: lessons.append(parts) or losses_on(run, *parts))
    noise = {"filter": {"kind": "noise", "noise": 0.5}, "coordinator": {"lift": "none"}}
    config = make_config(adapter=noise, max_steps=8, save_every=0)
    config.method.held_out, config.method.teach_every = 0.4, 2  # of 22 examples nine
    train(config)
    early, late = (set(itertools.chain(*part)) for part in (trained[:4], trained[4:]))
    held_out = set(itertools.chain(*(unseen for _, unseen in lessons)))
    assert len(lessons) == 4  # looked up at every early step; taught at every second
    assert not held_out & early
    assert held_out & late
    for (training, _), batch in zip(lessons[:2], trained, strict=False):
        assert not set(training) & set(batch)


def test_another_seed_changes_training_and_evaluating_saving_and_measuring_do_not(make_config: MakeConfig) -> None:
    plain, _ = (train(make_config(name, seed=seed, save_every=0)) for name, seed in (("a", 0), ("c", 1)))
    watched = train(make_config("b", watch_every=3, importance_examples=4, save_every=3, eval_every=4))
    a, b, c = (adapter_of(make_config(name)) for name in "abc")
    assert_identical(a, b)
    assert not any(torch.equal(a[name], c[name]) for name in a if "lora_" in name)
    assert plain["importance"] is None
    assert plain["curves"]["structure"] == []
    assert [look["step"] for look in watched["curves"]["structure"]] == [3, 6, 8]
    assert all(-1.0 <= look["gradient_cosine"] <= 1.0 for look in watched["curves"]["structure"])
    kinds = ("removal_gate", "removal_level", "removal_norm", "removal_first_order", "gate_first_order")
    assert set(watched["importance"]) == set(kinds)
    assert watched["curves"]["step"] == list(range(1, 9))
    assert watched["structure"]["adjacent_cosine"] == pytest.approx(
        watched["curves"]["structure"][-1]["adjacent_cosine"], abs=1e-5
    )


def test_accumulated_gradients_are_those_of_the_large_batch(make_config, tiny_bert, tmp_path) -> None:
    folder = without_dropout(tiny_bert, tmp_path / "bert-without-dropout")
    # 22 examples: the last step of an epoch has 4, in micro-batches of 3 and 1; or 6 in batches of 8.
    adapters = []
    for name, batch, accumulation in (("a", 8, 1), ("b", 3, 3), ("c", 9, 1)):
        config = make_config(
            name, batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=4, save_every=0
        )
        config.model.path = str(folder)
        train(config)
        adapters.append(adapter_of(config))
    eight, three_by_three, nine = adapters
    for name, value in nine.items():
        torch.testing.assert_close(three_by_three[name], value, rtol=1e-3, atol=1e-4)
    assert not all(torch.allclose(eight[k], nine[k], rtol=1e-3, atol=1e-4) for k in eight)


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 5))
def test_every_epoch_visits_every_example_once_in_an_order_of_its_own(count: int, per_step: int, seed: int) -> None:
    order = Order(count, per_step, seed)
    for epoch in (0, 1):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        assert sorted(i for step in steps for i in order.step(step)) == list(range(count))
        assert order.step(steps[-1]) == Order(count, per_step, seed).step(steps[-1])  # whatever was asked before


# Settings that have a state of their own, a few to a run: what one of them forgets shows beside the others.
VARIANTS: dict[str, dict[str, Any]] = {
    "dropout, gumbel gates, accumulation": {
        "gradient_accumulation_steps": 2, "batch_size": 3, "eval_every": 3, "watch_every": 3,
        "lr_scheduler": "cosine", "warmup_ratio": 0.3, "head_lr": 0.05,
        "adapter": {"lora_dropout": 0.2, "filter": {"kind": "gumbel_sigmoid"}},
    },
    "rare edges": {
        "adapter": {
            "graph": {"edges": "gradient", "refresh_every": 3}, "init_lora_weights": "gradient",
            "filter": {"gamma": 0.1, "label_term": "decoder", "num_labels": 2},
        },
    },
    "bfloat16": {"mixed_precision": "bf16", "adapter": {"coordinator": {"lift": "project"}}},
    "learned edges between roles": {
        "adapter": {
            "graph": {"edges": "learned", "refresh_every": 2},
            "coordinator": {"conv": "GraphConv", "hetero": "hetero_conv", "hidden_channels": 4},
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("variant", slow_but([*VARIANTS][:2], VARIANTS))
def test_a_resumed_run_ends_bit_for_bit_like_an_undisturbed_one(variant: str, make_config: MakeConfig) -> None:
    config = make_config("run", save_every=4, **VARIANTS[variant])
    train(config)
    adapter, lines = adapter_of(config), lines_of(config)
    state = load_file(folder_of(config) / "checkpoint-8" / "structlora_state.safetensors")
    # Step 4 lies within the first epoch of 6 steps, with accumulation at the end of one; 8 is the last one.
    for step in {"rare edges": (4, 8)}.get(variant, (4,)):
        interrupt(folder_of(config), step)
        torch.manual_seed(step)  # whatever happened in the process before must not matter
        results = train(config, resume=True)
        assert_identical(adapter, adapter_of(config))
        assert_identical(state, load_file(folder_of(config) / "checkpoint-8" / "structlora_state.safetensors"))
        assert lines_of(config) == lines
        assert results["metrics"] == next(x["evaluation"] for x in reversed(lines) if "evaluation" in x)


def test_what_a_killed_process_has_half_written_is_removed(finished, tmp_path, make_config) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 9, "lo')
    (folder / ".checkpoint-6.tmp").mkdir()
    (folder / "adapter").mkdir()
    for place in (folder / ".checkpoint-6.tmp" / "trainer.pt", folder / "adapter" / ".adapter_model.x1y2.tmp"):
        place.write_bytes(b"half a file")
    train(make_config("run", max_steps=6), resume=True)
    assert [line["step"] for line in lines_of(make_config("run")) if "loss" in line] == list(range(1, 7))
    assert list(folder.rglob(".*.tmp")) == []


@pytest.mark.slow
def test_two_processes_train_and_resume_like_each_other(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(max_steps=6, **VARIANTS["rare edges"])  # which saves a half refresh
    file = tmp_path / "config.pkl"
    file.write_bytes(pickle.dumps(config))
    assert launch("ddp", file).returncode == 0
    adapter = adapter_of(config)
    interrupt(folder_of(config), 4)
    assert launch("ddp", file, "resume").returncode == 0
    assert_identical(adapter, adapter_of(config))
    assert json.loads((folder_of(config) / "results.json").read_text())["processes"] == 2
    interrupt(folder_of(config), 2)
    with pytest.raises(CheckpointError, match="written by 2 processes, this run has 1"):
        train(config, resume=True)


@pytest.mark.slow
def test_layers_that_accelerate_compiles_train_the_same_adapter(make_config, monkeypatch) -> None:
    options = {"max_steps": 6, "adapter": {"graph": {"refresh_every": 2}}}
    train(make_config("plain", **options))
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    compiled = make_config("compiled", **options)
    torch._dynamo.reset()
    train(compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    plain = adapter_of(make_config("plain", **options))
    assert plain.keys() == adapter_of(compiled).keys()
    for name, value in adapter_of(compiled).items():
        torch.testing.assert_close(value, plain[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("method", ["lora_fa", "structlora"])
def test_a_rate_of_the_head_moves_the_head_and_nothing_else(method: str, make_config: MakeConfig) -> None:
    moved = {}
    for rate in (0.01, 0.02):
        schedule = {"warmup_steps": 0, "ramp_steps": 1}
        options = {"max_steps": 1, "warmup_ratio": 0.0, "weight_decay": 0.0, "adapter": {"schedule": schedule}}
        config = make_config(f"{rate}", method=method, lr=0.01, head_lr=rate, **options)
        train(config)
        moved[rate] = load_file(next(folder_of(config).glob("*/*model.safetensors")))
    for name, value in moved[0.02].items():
        gap = (value - moved[0.01][name]).abs().max()  # Adam's first step is as long as the rate
        assert gap == pytest.approx(0.01 if "classifier" in name or "pooler" in name else 0.0, rel=0.01), name


def test_a_folder_with_a_run_is_refused_before_any_work(make_config: MakeConfig) -> None:
    config = make_config(max_steps=2)
    train(config)
    before = {p: p.stat().st_mtime_ns for p in folder_of(config).rglob("*")}
    unreadable = make_config(max_steps=3)
    unreadable.model.path = "/nowhere"  # a ModelError would mean that loading had begun
    for resume in (False, True):
        with pytest.raises(FileExistsError, match=r"finished run \(results\.json\); choose another train\.output_dir"):
            train(unreadable, resume=resume)
    interrupt(folder_of(config), 2)
    with pytest.raises(FileExistsError, match="unfinished run; continue it with --resume"):
        train(unreadable)
    for checkpoint in folder_of(config).glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(CheckpointError, match="stopped before its first checkpoint"):
        train(config, resume=True)
    with pytest.raises(CheckpointError, match="holds no run to resume; start without --resume"):
        train(make_config("new"), resume=True)
    (folder_of(config).parent / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="is a file; give a folder"):
        train(make_config("file"))
    assert all(p.stat().st_mtime_ns == t for p, t in before.items() if p.is_file() and p.exists())


def test_resuming_with_another_configuration_names_every_key_that_differs(finished, tmp_path, make_config) -> None:
    shutil.copytree(finished, tmp_path / "run")
    adapter = {"r": 4, "coordinator": {"conv": "SAGEConv", "hidden_channels": 8}}
    other = make_config("run", max_steps=6, lr=0.5, adapter=adapter)
    with pytest.raises(ConfigError) as caught:
        train(other, resume=True)
    assert [p.split(":")[0] for p in caught.value.problems] == ["adapter.coordinator.conv", "adapter.r", "train.lr"]
    assert "was started with 0.01, not 0.5" in str(caught.value)
    file = folder_of(other) / "config.json"
    settings = json.loads(file.read_text())
    del settings["model"]["overrides"]  # a setting that did not exist when the run was begun
    file.write_text(json.dumps(settings))
    assert train(make_config("run", max_steps=6), resume=True)["steps"] == 6


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code of a checkpoint was run')",))


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("trainer.pt", truncated),
        ("trainer.pt", lambda file: file.write_bytes(b"")),
        ("trainer.pt", lambda file: torch.save({"step": 4, "processes": 1, "evil": Evil()}, file)),
        ("random-0.pt", Path.unlink),
        ("structlora_state.safetensors", truncated),
        ("structlora_state.safetensors", Path.unlink),
        ("../config.json", truncated),
        ("../config.json", Path.unlink),
        ("../config.json", lambda file: file.write_text("[]")),
    ],
)
def test_a_damaged_checkpoint_is_named_and_never_passed_over(name, damage, finished, tmp_path, make_config) -> None:
    shutil.copytree(finished, tmp_path / "run")
    damage(tmp_path / "run" / "checkpoint-4" / name)
    place = f"Delete {tmp_path / 'run' / 'checkpoint-4'} to resume from the checkpoint before"
    with pytest.raises(CheckpointError, match=r"config\.json (is damaged|does not exist)" if "/" in name else place):
        train(make_config("run", max_steps=6), resume=True)


def test_a_full_disk_leaves_the_checkpoints_before_and_the_run_can_go_on(make_config: MakeConfig) -> None:
    config = make_config("run", max_steps=4)
    with (
        disk_that_fills(lambda: (folder_of(config) / "checkpoint-2").exists(), 2000),
        pytest.raises(CheckpointError, match=r"checkpoint-4 could not be written .* with --resume"),
    ):
        train(config)
    assert [p.name for p in folder_of(config).glob("*checkpoint*")] == ["checkpoint-2"]
    assert train(config, resume=True)["steps"] == 4


def test_old_checkpoints_go_only_after_the_new_one_is_complete(make_config, monkeypatch) -> None:
    config = make_config(keep_checkpoints=1, max_steps=4)
    seen: list[list[str]] = []
    rename = Path.rename

    def watched(self: Path, target: Path) -> Path:
        seen.append(sorted(p.name for p in folder_of(config).glob("checkpoint-*")))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watched)
    train(config)
    assert seen == [[], ["checkpoint-2"]]
    assert [p.name for p in folder_of(config).glob("checkpoint-*")] == ["checkpoint-4"]


@pytest.mark.parametrize("resume", [False, True])
def test_two_processes_cannot_train_in_one_folder(resume, finished, tmp_path, make_config) -> None:
    config = make_config("run", max_steps=6)
    if resume:
        shutil.copytree(finished, tmp_path / "run")
    else:
        folder_of(config).mkdir()
    before = {p: p.read_bytes() for p in folder_of(config).rglob("*") if p.is_file()}
    with (
        FileLock(folder_of(config) / ".lock"),
        pytest.raises(FileExistsError, match=r"another process trains in .*; wait for it"),
    ):
        train(config, resume=resume)
    left = {p: p.read_bytes() for p in folder_of(config).rglob("*") if p.is_file() and p.name != ".lock"}
    assert left == {p: content for p, content in before.items() if p.name != ".lock"}


@pytest.mark.parametrize("settings", [{"save_every": 1}, {"save_every": 0, "eval_every": 1}])
def test_a_run_that_is_not_finite_stops_and_leaves_no_result(settings: dict[str, int], make_config: MakeConfig) -> None:
    config = make_config(lr=1e30, lr_scheduler="constant", max_grad_norm=1e30, **settings)
    with pytest.raises(FloatingPointError, match=r"optimizer step \d: .*(nan|inf|not finite).*; no checkpoint was"):
        train(config)
    assert not list(folder_of(config).glob("*checkpoint*"))
    assert not (folder_of(config) / "results.json").exists()


def test_a_run_that_diverges_later_names_and_keeps_its_last_checkpoint(make_config, monkeypatch) -> None:
    config = make_config(max_steps=4)
    loss = SentenceTask.loss

    def poisoned(self: SentenceTask, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        factor = math.nan if (folder_of(config) / "checkpoint-2").exists() else 1.0
        return loss(self, model, batch) * factor

    with monkeypatch.context() as patch:
        patch.setattr(SentenceTask, "loss", poisoned)
        text = r"step 3: the loss is nan \(first: .*\); the last checkpoint is .*-2\."
        with pytest.raises(FloatingPointError, match=text):
            train(config)
    assert train(config, resume=True)["steps"] == 4


def test_a_loss_that_explodes_is_an_alarm(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, loss = itertools.count(1), SentenceTask.loss
    monkeypatch.setattr(SentenceTask, "loss", lambda *given: loss(*given) * (1e6 if next(calls) > 2 else 1))
    with pytest.warns(AlarmWarning, match="a thousand times the lowest so far: the run diverges"):
        results = train(make_config(method="lora", max_steps=4, save_every=0))
    assert results["alarms"] == [f"optimizer step 3: {DIVERGES}"]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"lr": -1.0, "batch_size": 0}, "the configuration has 2 problems"),
        ({"head_lr": 0.0}, "train.head_lr must be > 0, got 0.0"),
        ({"lr_scheduler": "reduce_lr_on_plateau"}, "'reduce_lr_on_plateau' is unknown; allowed: linear, cosine,"),
        (
            {"adapter": {"schedule": {"warmup_steps": 8}}},
            "training has 8 optimizer steps: filter and coordinator would",
        ),
        (
            {"adapter": {"filter": {"gamma": 0.1, "label_term": "decoder", "num_labels": 3}}},
            "adapter.filter.num_labels=3, but rte has 2",
        ),
        ({"method": "full", "watch_every": 2}, "train.watch_every has no effect with method.name=full"),
        ({"method": "lora", "importance_examples": 2}, "train.importance_examples needs a structlora method"),
        ({"mixed_precision": "fp16"}, "fp16 needs a GPU"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_before_the_first_step(changes, part, make_config) -> None:
    if "mixed_precision" in changes and torch.cuda.is_available():
        pytest.skip("with a GPU fp16 is available")
    config = make_config(**changes)
    with pytest.raises(ConfigError) as caught:
        train(config)
    assert part in str(caught.value)
    assert not folder_of(config).exists() or list(folder_of(config).iterdir()) in ([], [folder_of(config) / ".lock"])
