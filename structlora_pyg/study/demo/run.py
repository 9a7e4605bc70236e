"""The demo: a small vision transformer that knows the digits 0-4 learns 5-9 from ten examples each.

It does so with the LoRA of stock PEFT and with StructLoRA, on the same seeds, examples, order of the data, steps and
optimizer, each method at the learning rate that served it best on validation pictures, which nothing is trained on.
Test pictures are looked at once a seed and method.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from timm.models.vision_transformer import VisionTransformer
from tqdm.auto import tqdm

from structlora_pyg.analysis.structure import Structure, adapter_structure
from structlora_pyg.files import replace_file
from structlora_pyg.stage_config import CoordinatorConfig, FilterConfig
from structlora_pyg.study.demo.models import (
    ALPHA,
    BATCH,
    MAX_NORM,
    RANK,
    SLICES,
    WARMUP_RATIO,
    WEIGHT_DECAY,
    accuracy,
    build,
    logits_of,
    structlora_config,
    train,
)
from structlora_pyg.study.demo.report import export_sentence, result_table, write_demo_report
from structlora_pyg.study.stats import compare, mean_sd, verdict
from structlora_pyg.study.tasks.digits import ARCHITECTURE, Digits, pretrained_vit, with_new_head
from structlora_pyg.tuner.model import StructLoraModel, get_structlora_model
from structlora_pyg.tuner.optim import parameter_groups

METHODS = ("LoRA", "StructLoRA")
PER_CLASS = 10  # training examples a class
PACKAGES = ("structlora-pyg", "torch", "torch-geometric", "peft", "timm", "scikit-learn")
TIMED_STEPS = 30


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the runs have in common.

    Attributes:
        seeds: Number of paired runs.
        steps: Optimizer steps a run.
        learning_rates: Grid that every method chooses from.
        tuning_seeds: Number of seeds, from the first, whose runs the choice rests on.
        pretraining_steps: Optimizer steps on the digits 0-4.
    """

    seeds: int
    steps: int
    learning_rates: tuple[float, ...]
    tuning_seeds: int
    pretraining_steps: int

    def problems(self) -> list[str]:
        """Return every problem of the values."""
        found = []
        if self.seeds < 2:
            found.append(f"seeds must be >= 2 for a paired comparison, got {self.seeds}")
        if self.steps < 10:
            found.append(f"steps must be >= 10, so that filter and graph get to act, got {self.steps}")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            found.append(f"learning_rates must be positive numbers, got {list(self.learning_rates)}")
        return found

    @property
    def tuned(self) -> int:
        """Seeds that every learning rate is run for; the others are run at the chosen one."""
        return min(self.tuning_seeds, self.seeds)

    @property
    def total_steps(self) -> int:
        """All optimizer steps of the demo after the pretraining."""
        return len(METHODS) * (self.tuned * len(self.learning_rates) + self.seeds - self.tuned) * self.steps


@dataclass(kw_only=True)
class Run:
    """One training run and what was measured on it.

    Attributes:
        seed: Seed of examples, head, start and order of the data.
        lr: Peak learning rate.
        accuracy: Share of right answers on the test pictures, in percent; only of runs at the chosen learning rate.
        relative_drift: See `structlora_pyg.analysis.structure.Structure`.
        adjacent_cosine: Likewise.
        open_gates: Share of directions whose gate is not 0, in percent; None for plain LoRA.
        mean_gate: Mean of all gates; None for plain LoRA.
        loss: Task loss, averaged over stretches of `curve_steps`.
        validation: Accuracy in percent on the validation pictures after each stretch.
        validation_loss: Cross-entropy on them at the end.
        curve_steps: Steps at the end of each stretch.
    """

    seed: int
    lr: float
    accuracy: float = math.nan
    relative_drift: float = math.nan
    adjacent_cosine: float = math.nan
    open_gates: float | None = None
    mean_gate: float | None = None
    loss: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    validation_loss: float = math.nan
    curve_steps: list[int] = field(default_factory=list)


def run_demo(
    output_dir: str | Path = "runs/demo",
    seeds: int = 5,
    steps: int = 150,
    learning_rates: Sequence[float] = (0.005, 0.01, 0.02),
    quick: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Run the demo: two to three minutes on one free processor core; no download.

    Args:
        output_dir: Folder for ``results.json``, ``report.html`` and ``adapter/``; files in it are replaced.
        seeds: Number of paired runs, >= 2.
        steps: Optimizer steps a run, >= 10.
        learning_rates: Grid that each method chooses from.
        quick: At most two seeds, 40 steps and two learning rates, to see that everything works; its numbers say
            nothing about the methods.
        progress: Show a progress bar and print the result.

    Returns:
        What ``results.json`` holds: ``verdict``, ``comparison``, ``methods`` (means and standard deviations),
        ``runs`` (every seed), ``learning_rates``, ``parameters``, ``milliseconds_per_step``, ``export``,
        ``settings``, ``versions``, ``command``, ``seconds``.

    Raises:
        ValueError: Arguments out of range.
        OSError: If the folder cannot be written.
        RuntimeError: If stock PEFT does not load the exported adapter to the same predictions.
    """
    settings = Settings(
        seeds=min(seeds, 2) if quick else seeds,
        steps=min(steps, 40) if quick else steps,
        learning_rates=tuple(learning_rates)[: 2 if quick else None],
        tuning_seeds=1 if quick else 5,
        pretraining_steps=60 if quick else 300,
    )
    if problems := settings.problems():
        raise ValueError("; ".join(problems))
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    total = settings.pretraining_steps + settings.total_steps
    with (
        one_thread(),
        torch.random.fork_rng(),
        tqdm(total=total, disable=not progress, unit="step", mininterval=0.5) as bar,
    ):
        digits = Digits.load()
        bar.set_description("pretraining on digits 0-4")
        base = pretrained_vit(digits, settings.pretraining_steps, bar.update)
        bar.total = settings.total_steps + bar.n  # nothing was trained if the model came from the cache
        chosen: dict[str, dict[str, Any]] = {}
        runs: dict[str, list[Run]] = {}
        kept: dict[str, PeftModel] = {}
        for method in METHODS:
            bar.set_description(f"learning 5-9 with {method}")
            chosen[method], finished = run_method(method, base, digits, settings, bar.update)
            for run, model in finished:
                examine(run, model, base, digits, settings)
            runs[method] = [run for run, _ in finished]
            kept[method] = finished[0][1]  # the first seed's, not the best one's
        bar.set_description("exporting and timing")
        structures = {method: measure(model, base, settings) for method, model in kept.items()}
        struct_lora = kept["StructLoRA"]
        assert isinstance(struct_lora, StructLoraModel)
        graph = struct_lora.adapter_graph()
        export = prove_export(struct_lora, folder / "adapter", digits, settings)
        milliseconds = time_steps(kept, digits)
    results = summarize(runs, chosen, settings, digits)
    results["parameters"] = {method: count_parameters(model) for method, model in kept.items()}
    results["milliseconds_per_step"] = milliseconds
    results["export"] = export
    results["command"] = (
        f"run_demo(output_dir={str(folder)!r}, seeds={seeds}, steps={steps}, "
        f"learning_rates={list(learning_rates)}, quick={quick})"
    )
    results["seconds"] = round(time.perf_counter() - start, 1)
    table = result_table(results)
    replace_file(folder / "results.json", json.dumps(_without_nan(results), indent=2, allow_nan=False) + "\n")
    report = folder / "report.html"
    write_demo_report(report, results, structures, graph)
    if progress:
        for text in (table.text(), table.note, results["verdict"], export_sentence(export)):
            tqdm.write(f"\n{text}")
        tqdm.write(f"\nreport: {report}\nadapter: {folder / 'adapter'}\nnumbers: {folder / 'results.json'}")
    return results


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread for a while.

    So small a model gains next to nothing by a second one, loses a factor of ten where other programs want the cores,
    and with one the numbers do not depend on the machine's core count.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run_method(
    method: str, base: VisionTransformer, digits: Digits, settings: Settings, on_step: Callable[[], Any]
) -> tuple[dict[str, Any], list[tuple[Run, PeftModel]]]:
    """Choose the learning rate of a method and run it with every seed.

    The mean validation accuracy over the tuning seeds decides; among equals the lower validation loss.

    Returns:
        ``lr`` and the ``trials`` it was chosen from; the runs at that learning rate with their models, one a seed.
    """
    trials, finished = [], {}
    for lr in settings.learning_rates:
        finished[lr] = [adapt(method, base, digits, settings, seed, lr, on_step) for seed in range(settings.tuned)]
        found = [run for run, _ in finished[lr]]
        trials.append(
            {
                "lr": lr,
                "accuracy": sum(run.validation[-1] for run in found) / len(found),
                "loss": sum(run.validation_loss for run in found) / len(found),
            }
        )
    lr = max(trials, key=lambda trial: (trial["accuracy"], -trial["loss"]))["lr"]
    rest = range(settings.tuned, settings.seeds)
    runs = finished[lr] + [adapt(method, base, digits, settings, seed, lr, on_step) for seed in rest]
    return {"lr": lr, "trials": trials}, runs


def adapt(
    method: str,
    base: VisionTransformer,
    digits: Digits,
    settings: Settings,
    seed: int,
    lr: float,
    on_step: Callable[[], Any],
) -> tuple[Run, PeftModel]:
    """Train one model on the training examples of a seed; the test pictures are not touched."""
    model, run = build(method, base, settings.steps, seed), Run(seed=seed, lr=lr)

    def at(step: int, loss: float) -> None:
        logits = logits_of(model, digits.validation)
        run.curve_steps.append(step)
        run.loss.append(loss)
        run.validation.append(accuracy(logits, digits.validation.y))
        run.validation_loss = float(F.cross_entropy(logits, digits.validation.y))

    examples = digits.draw(PER_CLASS, seed)
    train(model, examples, lr, settings.steps, seed, on_step, max(1, settings.steps // 10), at)
    return run, model


def examine(run: Run, model: PeftModel, base: VisionTransformer, digits: Digits, settings: Settings) -> None:
    """Fill in what is measured on a finished run, the test accuracy among it."""
    run.accuracy = accuracy(logits_of(model, digits.test), digits.test.y)
    found = measure(model, base, settings)
    run.relative_drift, run.adjacent_cosine = found.relative_drift, found.adjacent_cosine
    if isinstance(model, StructLoraModel):
        gate = model.adapter_graph().gate
        run.open_gates, run.mean_gate = 100.0 * float((gate != 0).float().mean()), float(gate.mean())


def measure(model: PeftModel, base: VisionTransformer, settings: Settings) -> Structure:
    """Return the structure of the updates of q and v, told apart in the same way for both methods."""
    if not isinstance(model, StructLoraModel):
        config = structlora_config(settings.steps)
        config.filter, config.coordinator = FilterConfig(kind="none"), CoordinatorConfig(conv="none")
        twin = get_structlora_model(with_new_head(base, 0), config)  # plain LoRA that knows its slices
        _, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
        assert not unexpected, unexpected
        model = twin
    return adapter_structure(model)


def prove_export(model: StructLoraModel, folder: Path, digits: Digits, settings: Settings) -> dict[str, Any]:
    """Export the adapter, load it with stock PEFT on a freshly loaded base and compare the predictions.

    Returns:
        What `StructLoraModel.export` returns, ``max_logit_difference``, ``identical_predictions``, ``pictures``.

    Raises:
        RuntimeError: If the two models do not agree.
    """
    exported: dict[str, Any] = model.export(folder)
    fresh = with_new_head(pretrained_vit(digits, settings.pretraining_steps), seed=2**31)  # its head must not matter
    loaded = PeftModel.from_pretrained(fresh, folder)
    ours, theirs = logits_of(model, digits.test), logits_of(loaded, digits.test)
    difference = float((ours - theirs).abs().max())
    identical = bool((ours.argmax(1) == theirs.argmax(1)).all())
    if not identical or difference > 1e-4 * (1.0 + float(ours.abs().max())):
        raise RuntimeError(
            f"the adapter in {folder}, loaded by stock PEFT, does not reproduce the trained model: largest difference "
            f"of logits {difference:.2e}, identical predictions: {identical}"
        )
    return {
        **exported,
        "max_logit_difference": difference,
        "identical_predictions": identical,
        "pictures": len(digits.test),
    }


def time_steps(models: dict[str, PeftModel], digits: Digits) -> dict[str, float]:
    """Return the median time of a training step of each method in milliseconds, and the ``ratio``.

    The models take turns in one process; the ratio is the median over turns of StructLoRA by LoRA, so that what else
    the machine does at the time falls on both.
    """
    batch = digits.pool[torch.arange(BATCH)]
    optimizers = {method: torch.optim.AdamW(parameter_groups(model, 1e-6)) for method, model in models.items()}
    times: dict[str, list[float]] = {method: [] for method in models}
    for turn in range(TIMED_STEPS + 2):
        for method, model in models.items():
            model.train()
            start = time.perf_counter()
            optimizers[method].zero_grad()
            loss = F.cross_entropy(model(batch.x), batch.y)
            if isinstance(model, StructLoraModel):
                loss = loss + model.auxiliary_loss(batch.y)
            loss.backward()
            optimizers[method].step()
            if turn >= 2:  # the first ones pay for allocations
                times[method].append(1000.0 * (time.perf_counter() - start))
    ratios = [ours / plain for ours, plain in zip(times["StructLoRA"], times["LoRA"], strict=True)]
    return {**{method: median(values) for method, values in times.items()}, "ratio": median(ratios)}


def count_parameters(model: PeftModel) -> dict[str, int]:
    """Return trained parameters: ``adapter`` (free entries of the factors), ``head``, ``training_only``."""
    lora = [p for name, p in model.named_parameters() if ".lora_" in name]
    training_only = model.parameter_counts()["training_only"] if isinstance(model, StructLoraModel) else 0
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "adapter": ARCHITECTURE["depth"] * len(SLICES) * RANK * 2 * ARCHITECTURE["embed_dim"],
        "head": trained - training_only - sum(p.numel() for p in lora),
        "training_only": training_only,
    }


def summarize(
    runs: dict[str, list[Run]], chosen: dict[str, dict[str, Any]], settings: Settings, digits: Digits
) -> dict[str, Any]:
    """Return means, paired differences and the verdict over the runs of all seeds."""
    measured = ("accuracy", "relative_drift", "adjacent_cosine")
    methods: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        values = {name: [getattr(run, name) for run in runs[method]] for name in (*measured, "open_gates", "mean_gate")}
        methods[method] = {
            name: dict(zip(("mean", "sd"), mean_sd(column), strict=True))
            for name, column in values.items()
            if None not in column
        }
    pairs = {
        name: compare([getattr(run, name) for run in runs["StructLoRA"]], [getattr(run, name) for run in runs["LoRA"]])
        for name in measured
    }
    return {
        "verdict": verdict("StructLoRA", "LoRA", pairs["accuracy"]),
        "comparison": {name: asdict(pair) for name, pair in pairs.items()},
        "methods": methods,
        "learning_rates": chosen,
        "runs": {method: [asdict(run) for run in runs[method]] for method in METHODS},
        "settings": {
            **asdict(settings),
            "examples_per_class": PER_CLASS,
            "validation_pictures": len(digits.validation),
            "test_pictures": len(digits.test),
            "batch_size": BATCH,
            "weight_decay": WEIGHT_DECAY,
            "max_grad_norm": MAX_NORM,
            "warmup_ratio": WARMUP_RATIO,
            "rank": RANK,
            "lora_alpha": ALPHA,
            "structlora": structlora_config(settings.steps).own_fields(),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in PACKAGES},
        },
    }


def _without_nan(value: Any) -> Any:
    """Replace NaN, which JSON does not know, by None."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
