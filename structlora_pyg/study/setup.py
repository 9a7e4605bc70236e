"""What a run is made of: checked settings, then a task, a method on its model, and the order of the data."""

from __future__ import annotations

import copy
import math
import shutil
import sys
import time
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import set_seed

from structlora_pyg.checks import ConfigError
from structlora_pyg.config import StructLoraConfig
from structlora_pyg.data.transforms import make_transform
from structlora_pyg.nn.conv import example_graph
from structlora_pyg.study.config import RunConfig
from structlora_pyg.study.distributed import make_accelerator, tracker_problems
from structlora_pyg.study.methods import METHODS, Method, make_method, method_problems
from structlora_pyg.study.steps import Order, accumulate_gradients, first_batches
from structlora_pyg.study.tasks import TASKS, Task, load_task, task_problems
from structlora_pyg.tuner.graph_pass import make_coordinator

LESSON = 3  # training steps that a lesson of the noise levels takes
# Types of nodes and edges of a small graph: what `hetero` has to run on between roles, and within one.
TWO_ROLES = (
    ["query", "value"],
    [("query", "same_role", "query"), ("query", "other", "value"), ("value", "other", "query")],
)


def run_problems(config: RunConfig) -> list[str]:
    """Return what does not go together in a configuration, as far as it can be told before anything is loaded."""
    found, settings = task_problems(config.model, config.data), config.train
    found += method_problems(config.adapter, config.method)
    kind = METHODS.get(config.method.name, Method)
    if kind.is_structlora:
        found += _graph_problems(config.adapter)
        found += schedule_problems(config.adapter, settings.max_steps or sys.maxsize)
    if settings.mixed_precision == "fp16" and not torch.cuda.is_available():
        found.append("train.mixed_precision=fp16 needs a GPU; use bf16 or no")
    if settings.watch_every and not kind.has_updates:
        found.append(f"train.watch_every has no effect with method.name={kind.name}, which has no LoRA updates")
    if settings.record_every and not kind.is_structlora:
        found.append(f"train.record_every has no effect with method.name={kind.name}, which has no adapter graph")
    if settings.importance_examples and not kind.is_structlora:
        found.append(f"train.importance_examples needs a structlora method, not method.name={kind.name}")
    return found + [f"train.trackers: {problem}" for problem in tracker_problems(settings.trackers)]


def schedule_problems(adapter: StructLoraConfig, total: int) -> list[str]:
    """Return what is wrong with a schedule for a training of `total` optimizer steps."""
    acts = adapter.filter.kind != "none" or adapter.coordinator.conv not in (None, "none")
    if not acts or total > adapter.schedule.warmup_steps:
        return []
    return [
        f"adapter.schedule.warmup_steps={adapter.schedule.warmup_steps}, but training has {total} optimizer steps: "
        "filter and coordinator would never act. Lower it, or train longer"
    ]


def _graph_problems(adapter: StructLoraConfig) -> list[str]:
    """Build transforms and coordinator on a small graph that carries what the graph of the run will."""
    graph, part = adapter.graph, adapter.coordinator
    example = example_graph(weighted=True, relations=4 if graph.edge_types else 0)
    example.role = example.node_type = example.block = torch.zeros(example.num_nodes, dtype=torch.long)
    if graph.edge_features:
        example.edge_attr = torch.ones(example.num_edges, 4)
    where = "graph.transforms"
    try:
        for spec in graph.transforms:
            make_transform(spec)
        where = "coordinator.conv"
        if part.conv not in (None, "none"):
            with torch.random.fork_rng(devices=[]):
                make_coordinator(part, example.num_features, example, TWO_ROLES)
    except ValueError as error:
        return [f"adapter.{where}: {error}"]
    return []


def smoke(config: RunConfig) -> RunConfig:
    """Return three steps of a run on a few examples, in ``<output_dir>-smoke``, from which an older one is removed."""
    run = copy.deepcopy(config)
    if not TASKS[run.data.task].brings_data:
        run.data = replace(run.data, train_limit=16, eval_limit=8, train_fraction=1.0)
    settings, schedule = run.train, run.adapter.schedule
    schedule.warmup_steps, schedule.ramp_steps = min(schedule.warmup_steps, 1), min(schedule.ramp_steps, 1)
    if METHODS[run.method.name].is_structlora:
        run.method.teach_every = 2
    run.train = replace(
        settings, output_dir=f"{settings.output_dir}-smoke", max_steps=3, batch_size=min(settings.batch_size, 2),
        eval_batch_size=min(settings.eval_batch_size, 4), gradient_accumulation_steps=1, eval_every=0, save_every=0,
        watch_every=min(settings.watch_every, 1), record_every=min(settings.record_every, 1),
        importance_examples=min(settings.importance_examples, 2),
    )  # fmt: skip
    if (Path(run.train.output_dir) / "config.json").is_file():
        shutil.rmtree(run.train.output_dir)
    return run


def estimate(config: RunConfig) -> str:
    """Return what a run will take, from its first steps with everything at work; nothing is written.

    Raises:
        ConfigError, DataError, ModelError: As `structlora_pyg.study.train.train`.
    """
    check_run(config)
    run = copy.deepcopy(config)
    run.adapter.schedule.warmup_steps = min(run.adapter.schedule.warmup_steps, 1)
    settings, accelerator = run.train, make_accelerator(run)
    task = load_task(run.model, run.data, settings.seed)
    task.model.to(accelerator.device)
    method, order, total = adapt(run, task, accelerator.num_processes)
    model, optimizer = accelerator.prepare(method.model, method.optimizer(settings.lr, settings.weight_decay))
    model.train()
    times = []
    for step in range(min(total, 4)):  # the first one or two also set things up
        began = time.perf_counter()
        accumulate_gradients(method, task, model, accelerator, order.step(step), settings.batch_size)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
    seconds = sum(times[-2:]) / len(times[-2:])
    whole = total * seconds * (1 + LESSON / run.method.teach_every * order.returned / total)
    import resource  # not on Windows, where all else works

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if on_gpu := accelerator.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(accelerator.device)
    return (
        f"about {timedelta(seconds=math.ceil(whole))} for {total} steps of {seconds:.2g} s, and {peak / 1e9:.2g} GB of "
        f"{'GPU ' * on_gpu}memory; estimated from two steps on {accelerator.device}, evaluation not counted"
    )


def check_run(config: RunConfig) -> None:
    """Raise a `ConfigError` with everything that is wrong with a configuration."""
    if found := config.problems() + run_problems(config):
        raise ConfigError(found)


def adapt(config: RunConfig, task: Task, processes: int = 1) -> tuple[Method, Order, int]:
    """Adapt the model of a task in place, as a configuration says.

    Args:
        config: Configuration of the run.
        task: Loaded, its model bare.
        processes: Number of processes that share a batch.

    Returns:
        The method, which holds the adapted model; the order of the data; the number of optimizer steps.

    Raises:
        ConfigError: If settings do not fit the model, the task, or the length of the run.
    """
    settings = config.train
    per_step = settings.batch_size * settings.gradient_accumulation_steps * processes
    adapter, examples = with_head(config.adapter, task.head), len(task.train_set)
    kind = METHODS[config.method.name]
    order = Order(examples, per_step, settings.seed, kind.held_out(adapter, config.method, examples))
    total = settings.max_steps or math.ceil(settings.epochs * order.steps_per_epoch)
    order.returned = round(config.method.teach_until * total) if order.held_out else 0
    method = make_method(adapter, config.method, total)
    found, labels = [], config.adapter.filter.num_labels
    if method.is_structlora:
        found = schedule_problems(config.adapter, total)
        if labels not in (None, task.num_labels):
            found.append(f"adapter.filter.num_labels={labels}, but {config.data.task} has {task.num_labels}")
    if found:
        raise ConfigError(found)
    if settings.gradient_checkpointing:
        task.enable_gradient_checkpointing()
    set_seed(settings.seed)
    batches = partial(first_batches, task, order, settings.batch_size)
    model = method.adapt(task.model, partial(batches, False), partial(batches, True))
    half = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if half:
        raise ConfigError(
            [f"model.dtype=float16 would train {half[0]} in float16, which AdamW cannot; use float32 or bfloat16"]
        )
    return method, order, total


def restore(config: RunConfig, checkpoint: Path) -> tuple[Task, Method]:
    """Return task and method of a run as they were at a folder ``checkpoint-<step>`` of it, on the CPU.

    Raises:
        ConfigError, DataError, ModelError: As `structlora_pyg.study.train.train`.
        FileNotFoundError, ValueError: If the checkpoint does not fit the configuration.
    """
    check_run(config)
    task = load_task(config.model, config.data, config.train.seed)
    method, _, _ = adapt(config, task)
    method.optimizer(config.train.lr, config.train.weight_decay)
    method.load(checkpoint)
    method.model.eval()
    return task, method


def with_head(adapter: StructLoraConfig, head: tuple[str, ...]) -> StructLoraConfig:
    """Return a copy that also trains and saves the head."""
    changed = copy.copy(adapter)
    changed.modules_to_save = list(dict.fromkeys([*(adapter.modules_to_save or []), *head])) or None
    return changed
