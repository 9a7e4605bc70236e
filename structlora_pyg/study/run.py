"""What a run is made of: checked settings, then a task, a method on its model, the order of the data, an optimizer."""

from __future__ import annotations

import contextlib
import copy
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import get_scheduler

from structlora_pyg.checks import ConfigError
from structlora_pyg.config import StructLoraConfig
from structlora_pyg.data.transforms import make_transform
from structlora_pyg.nn.conv import example_graph
from structlora_pyg.study.config import RunConfig
from structlora_pyg.study.distributed import average, reshard, shard, tracker_problems
from structlora_pyg.study.methods import METHODS, Method, make_method, method_problems
from structlora_pyg.study.run_folder import diverged
from structlora_pyg.study.tasks import load_task, task_problems
from structlora_pyg.tuner.fingerprint import fingerprint
from structlora_pyg.tuner.graph_pass import make_coordinator
from structlora_pyg.tuner.optim import set_head_rate

# Types of nodes and edges of a small graph: what `hetero` has to run on between roles, and within one.
TWO_ROLES = (
    ["query", "value"],
    [("query", "same_role", "query"), ("query", "other", "value"), ("value", "other", "query")],
)
RETURNED = 500_009  # sets the shufflings after the return of the examples held out apart from those before it
START_BATCHES = 8  # micro-batches that a gradient-aligned start or a calibration sees


def run_problems(config: RunConfig) -> list[str]:
    """Return what does not go together in a configuration, as far as it can be told before anything is loaded."""
    found, settings = task_problems(config.model, config.data), config.train
    found += method_problems(config.adapter, config.method)
    kind = METHODS.get(config.method.name, Method)
    if kind.is_structlora:
        found += _graph_problems(config.adapter)
        found += _schedule_problems(config.adapter, settings.max_steps or sys.maxsize)
    if settings.mixed_precision == "fp16" and not torch.cuda.is_available():
        found.append("train.mixed_precision=fp16 needs a GPU; use bf16 or no")
    if settings.watch_every and not kind.has_updates:
        found.append(f"train.watch_every has no effect with method.name={kind.name}, which has no LoRA updates")
    if settings.record_every and not kind.is_structlora:
        found.append(f"train.record_every has no effect with method.name={kind.name}, which has no adapter graph")
    if settings.importance_examples and not kind.is_structlora:
        found.append(f"train.importance_examples needs a structlora method, not method.name={kind.name}")
    return found + [f"train.trackers: {problem}" for problem in tracker_problems(settings.trackers)]


def check_run(config: RunConfig) -> None:
    """Raise a `ConfigError` with everything that is wrong with a configuration."""
    if found := config.problems() + run_problems(config):
        raise ConfigError(found)


def _schedule_problems(adapter: StructLoraConfig, total: int) -> list[str]:
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


class Order:
    """Which examples every optimizer step sees: a function of the seed and the step alone.

    Args:
        count: Number of training examples.
        per_step: Examples an optimizer step; the last step of an epoch takes what is left.
        seed: Seed of the run. Every pair of seed and epoch has a shuffling of its own.
        held_out: Number of examples, drawn with the seed, that no step sees before the step `returned`.

    Attributes:
        returned: Index of the step from which on all examples are trained on, >= 0.
    """

    def __init__(self, count: int, per_step: int, seed: int, held_out: int = 0) -> None:
        self.per_step, self.seed, self.returned = per_step, seed, 0
        drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist() if held_out else []
        self.held_out = sorted(drawn[:held_out])
        self._all = list(range(count))
        self._trained = sorted(set(self._all) - set(self.held_out))
        self.steps_per_epoch = math.ceil(count / per_step)
        self._key = -1
        self._shuffled: list[int] = []

    def step(self, index: int) -> list[int]:
        """Return the examples of a step, over all processes."""
        early = index < self.returned
        pool = self._trained if early else self._all
        epoch, position = divmod(index if early else index - self.returned, math.ceil(len(pool) / self.per_step))
        key = self.seed * 1_000_003 + epoch + (RETURNED if self.returned and not early else 0)
        if key != self._key:
            order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(key)).tolist()
            self._shuffled, self._key = [pool[i] for i in order], key
        return self._shuffled[position * self.per_step : (position + 1) * self.per_step]

    def unseen(self, index: int, count: int) -> list[int]:
        """Return `count` of the examples held out, in turn, or all where there are fewer."""
        start = index * count % max(len(self.held_out), 1)
        return (2 * self.held_out)[start : start + min(count, len(self.held_out))]


class Run:
    """A configuration put together, ready to be trained.

    Args:
        config: Configuration of the run, checked by `check_run`.
        accelerator: As `structlora_pyg.study.distributed.make_accelerator` returns it. Default: none, for a run that is
            only looked at, on the CPU.

    Attributes:
        task: What is learned; its model is adapted in place.
        method: Holds the adapted model.
        order: Which examples every step sees.
        total: Number of optimizer steps.
        optimizer, scheduler: Of the trained parameters.
        model: The adapted model, prepared for the accelerator.
        base: Fingerprint of the frozen base before training.
        base_parameters: Number of its parameters.
        sharded: Whether the base is cut over the devices.

    Raises:
        ConfigError: If settings do not fit the model, the task, or the length of the run.
        DataError, ModelError: See `structlora_pyg.study.tasks.load_task`.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator | None = None) -> None:
        settings = config.train
        self.config, self.folder = config, Path(settings.output_dir)
        self.accelerator: Any = accelerator
        self.task = load_task(config.model, config.data, settings.seed)
        self.base, own = fingerprint(self.task.model, leave_out=self.task.head), set(self.task.model.parameters())
        self.base_parameters = sum(p.numel() for p in own)
        # Asked before prepare(), after which Accelerate may have forgotten it.
        self.sharded = accelerator is not None and accelerator.is_fsdp2
        if accelerator is not None and not self.sharded:  # one device need not have room for what is to be sharded
            self.task.model.to(accelerator.device)
        self._adapt(accelerator.num_processes if accelerator is not None else 1)
        self.model = self.method.model
        self.optimizer: Any = self.method.optimizer(settings.lr, settings.weight_decay)
        if settings.head_lr is not None and self.task.head:
            set_head_rate(self.optimizer, self.model, self.task.head, settings.head_lr)
        warmup = math.ceil(settings.warmup_ratio * self.total)
        self.scheduler = get_scheduler(settings.lr_scheduler, self.optimizer, warmup, self.total)
        if accelerator is not None and self.sharded:
            self.model, self.optimizer = shard(accelerator, self.model, own, self.optimizer)
        elif accelerator is not None:
            self.model, self.optimizer = accelerator.prepare(self.model, self.optimizer)

    def _adapt(self, processes: int) -> None:
        """Adapt the model of the task in place; `processes` share a batch."""
        config, task, settings = self.config, self.task, self.config.train
        per_step = settings.batch_size * settings.gradient_accumulation_steps * processes
        adapter, examples = with_head(config.adapter, task.head), len(task.train_set)
        held_out = METHODS[config.method.name].held_out(adapter, config.method, examples)
        self.order = Order(examples, per_step, settings.seed, held_out)
        self.total = settings.max_steps or math.ceil(settings.epochs * self.order.steps_per_epoch)
        self.order.returned = round(config.method.teach_until * self.total) if self.order.held_out else 0
        self.method = make_method(adapter, config.method, self.total)
        found, labels = [], config.adapter.filter.num_labels
        if self.method.is_structlora:
            found = _schedule_problems(config.adapter, self.total)
            if labels not in (None, task.num_labels):
                found.append(f"adapter.filter.num_labels={labels}, but {config.data.task} has {task.num_labels}")
        if found:
            raise ConfigError(found)
        if settings.gradient_checkpointing:
            task.enable_gradient_checkpointing()
        set_seed(settings.seed)
        model = self.method.adapt(task.model, partial(self._first_batches, False), partial(self._first_batches, True))
        half = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
        if half:
            raise ConfigError(
                f"model.dtype=float16 would train {half[0]} in float16, which AdamW cannot; use float32 or bfloat16"
            )

    def _first_batches(self, gradients: bool) -> None:
        """Run the bare model on the first training batches; with `gradients`, backward passes too."""
        task, device = self.task, next(self.task.model.parameters()).device
        for step in range(START_BATCHES):
            batch = self._batch(self.order.step(step)[: self.config.train.batch_size], device)
            with warnings.catch_warnings(), contextlib.nullcontext() if gradients else torch.no_grad():
                # PEFT's hooks only read the gradients of outputs, which this warning is not about.
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                loss = task.loss(task.model, batch)
                if gradients:
                    loss.backward()

    def _batch(self, examples: Sequence[int], device: torch.device) -> Any:
        return send_to_device(self.task.collate([self.task.train_set[i] for i in examples]), device)

    def gradients(self, examples: list[int]) -> dict[str, float]:
        """Add the gradients of one optimizer step; return its ``loss``, the ``auxiliary`` terms and the ``total``.

        The examples are dealt out to the processes in turn. A micro-batch is weighted by its share of all examples, so
        that any split of a batch gives the same gradient; a process that has no example left repeats one without
        weight, because all have to run as many passes.
        """
        accelerator, size = self.accelerator, self.config.train.batch_size
        processes, total = accelerator.num_processes, len(examples)
        own, longest = examples[accelerator.process_index :: processes], math.ceil(total / processes)
        losses = {"loss": 0.0, "auxiliary": 0.0, "total": 0.0}

        def backward(share: float, loss: Tensor) -> None:
            accelerator.backward(loss * share)

        late = longest - len(own)  # a process with fewer examples has them in its last passes, which end the step
        for at in range(0, longest, size):
            chosen = own[max(at - late, 0) : at + size - late]
            loss = partial(self.task.loss, self.model, self._batch(chosen or examples[:1], accelerator.device))
            share = len(chosen) * processes / total
            with contextlib.nullcontext() if at + size >= longest else accelerator.no_sync(self.model):
                whole = self.method.backward(loss, partial(backward, share)).item()
            known = self.method.losses()
            auxiliary = known["auxiliary"]
            parts = {"loss": known.get("task", whole - auxiliary), "auxiliary": auxiliary, "total": whole}
            losses = {name: value + parts[name] * share for name, value in losses.items()}
        if processes > 1:  # also because all have to agree on whether a loss is finite
            mean = accelerator.reduce(torch.tensor(list(losses.values()), device=accelerator.device), "mean")
            losses = dict(zip(losses, mean.tolist(), strict=True))
        if isinstance(self.model, FSDPModule):
            average(self.method.model, accelerator)
        return losses

    def losses_on(self, *parts: list[int]) -> list[Callable[[], Tensor]]:
        """Return for each list of examples what runs the model on this process's share of them, at most one batch."""
        accelerator = self.accelerator

        def loss(examples: list[int]) -> Tensor:
            own = examples[accelerator.process_index :: accelerator.num_processes] or examples[:1]
            batch = self._batch(own[: self.config.train.batch_size], accelerator.device)
            with accelerator.autocast():
                return self.task.loss(self.method.model, batch)

        return [partial(loss, examples) for examples in parts]

    def evaluate(self, step: int) -> dict[str, float]:
        """Return the metrics on the evaluation set, after an optimizer step.

        Raises:
            FloatingPointError: If the model's output is not finite.
        """
        # A loader draws a number for its workers; from a generator of its own, evaluating leaves training as it is.
        examples: Any = self.task.eval_set
        loader: DataLoader = DataLoader(
            examples, self.config.train.eval_batch_size, collate_fn=self.task.collate, generator=torch.Generator()
        )
        try:
            return self.task.evaluate(self.model, loader)
        except FloatingPointError as error:
            raise diverged(str(error), step, self.folder) from error
        finally:
            reshard(self.model)

    def importance(self) -> dict[str, float | None] | None:
        """Return what `Method.importance` measures on the first evaluation examples; None if not asked."""
        if not (count := self.config.train.importance_examples):
            return None
        examples = [self.task.eval_set[i] for i in range(min(count, len(self.task.eval_set)))]
        batch = send_to_device(self.task.collate(examples), self.accelerator.device)
        found = self.method.importance(lambda: self.task.loss(self.method.model, batch))
        reshard(self.method.model)
        return found


def restore(config: RunConfig, checkpoint: Path) -> Run:
    """Return a run as it was at a folder ``checkpoint-<step>`` of it, on the CPU, in evaluation mode.

    Raises:
        ConfigError, DataError, ModelError: As `structlora_pyg.study.train.train`.
        FileNotFoundError, ValueError: If the checkpoint does not fit the configuration.
    """
    check_run(config)
    run = Run(config)
    run.method.load(checkpoint)
    run.model.eval()
    return run


def with_head(adapter: StructLoraConfig, head: tuple[str, ...]) -> StructLoraConfig:
    """Return a copy that also trains and saves the head."""
    changed = copy.copy(adapter)
    changed.modules_to_save = list(dict.fromkeys([*(adapter.modules_to_save or []), *head])) or None
    return changed
