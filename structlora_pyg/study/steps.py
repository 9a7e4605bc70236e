"""The steps of a training: which examples each sees, how gradients add up, and what is left of them."""

from __future__ import annotations

import contextlib
import math
import platform
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn
from torch.distributed.fsdp import FSDPModule

from structlora_pyg.analysis.structure import Structure
from structlora_pyg.study.distributed import average
from structlora_pyg.study.methods import Method
from structlora_pyg.study.tasks import Task

PACKAGES = ("structlora-pyg", "torch", "torch-geometric", "peft", "transformers", "timm", "accelerate")
CURVE_POINTS = 100  # a longer curve is averaged over stretches of equal length


def results(
    stored: Mapping[str, Any], task: Task, method: Method, device: torch.device, lines: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what `structlora_pyg.study.train.train` returns, but for what it knows itself, from the log's lines."""
    steps = [line for line in lines if "seconds" in line]
    seconds = [line["seconds"] for line in steps]
    cuda, gates = device.type == "cuda", method.gates()
    names, ends = ("loss", "auxiliary", "total"), [steps[0], steps[-1]] if steps else []
    return {
        "method": method.name,
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "steps": len(steps),
        "losses": {when: {n: line[n] for n in names} for when, line in zip(("first", "last"), ends, strict=False)},
        "seconds": {"per_step_median": statistics.median(seconds) if seconds else None, "training": sum(seconds)},
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "curves": _curves(lines, steps),
        "structure": _structure(method.structure()),
        "gates": gates and {**gates, "values": _rounded(gates["values"])},
        "device": torch.cuda.get_device_name() if cuda else f"{device.type}, threads: {torch.get_num_threads()}",
        "versions": {
            "python": platform.python_version(),
            **{name: installed(name) or "not installed" for name in PACKAGES},
        },
        "config": stored,
    }


def _curves(lines: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the loss, averaged over stretches, at the last step of each; and the looks at the structure."""
    width = -(-len(steps) // CURVE_POINTS) or 1
    stretches = [steps[i : i + width] for i in range(0, len(steps), width)]
    return {
        "step": [stretch[-1]["step"] for stretch in stretches],
        "loss": [round(statistics.fmean(line["loss"] for line in stretch), 6) for stretch in stretches],
        "structure": [{"step": line["step"], **line["structure"]} for line in lines if "structure" in line],
    }


def _structure(found: Structure | None) -> dict[str, Any] | None:
    if found is None:
        return None
    names = ("adjacent_cosine", "drift_energy", "relative_drift")
    numbers = {n: None if (value := getattr(found, n)) != value else value for n in names}
    return {"names": found.names, "similarity": _rounded(found.similarity.tolist()), **numbers}


def _rounded(matrix: list[list[float]]) -> list[list[float]]:
    return [[round(value, 5) for value in row] for row in matrix]


RETURNED = 500_009  # sets the shufflings after the return of the examples held out apart from those before it
START_BATCHES = 8  # micro-batches that a gradient-aligned start or a calibration sees


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


def first_batches(task: Task, order: Order, batch_size: int, gradients: bool) -> None:
    """Run the bare model on the first training batches; with `gradients`, backward passes too."""
    device = next(task.model.parameters()).device
    for step in range(START_BATCHES):
        batch = task.collate([task.train_set[i] for i in order.step(step)[:batch_size]])
        with warnings.catch_warnings(), contextlib.nullcontext() if gradients else torch.no_grad():
            # PEFT's hooks only read the gradients of outputs, which this warning is not about.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            loss = task.loss(task.model, send_to_device(batch, device))
            if gradients:
                loss.backward()


def accumulate_gradients(
    method: Method, task: Task, model: nn.Module, accelerator: Accelerator, examples: list[int], batch_size: int
) -> dict[str, float]:
    """Add the gradients of one optimizer step and return its ``loss``, the ``auxiliary`` terms and the ``total``.

    The examples are dealt out to the processes in turn. A micro-batch is weighted by its share of all examples, so that
    any split of a batch gives the same gradient; a process that has no example left repeats one without weight, because
    all have to run as many passes.
    """
    processes, total = accelerator.num_processes, len(examples)
    own, longest = examples[accelerator.process_index :: processes], math.ceil(total / processes)
    losses = {"loss": 0.0, "auxiliary": 0.0, "total": 0.0}
    late = longest - len(own)  # a process with fewer examples has them in its last passes, which end the step
    for at in range(0, longest, batch_size):
        chosen = own[max(at - late, 0) : at + batch_size - late]
        batch = send_to_device(task.collate([task.train_set[i] for i in chosen or examples[:1]]), accelerator.device)
        share = len(chosen) * processes / total
        last = at + batch_size >= longest
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            total_loss = method.backward(partial(task.loss, model, batch), partial(_backward, accelerator, share))
        known, whole = method.losses(), total_loss.item()
        auxiliary = known["auxiliary"]
        parts = {"loss": known.get("task", whole - auxiliary), "auxiliary": auxiliary, "total": whole}
        losses = {name: value + parts[name] * share for name, value in losses.items()}
    if processes > 1:  # also because all have to agree on whether a loss is finite
        mean = accelerator.reduce(torch.tensor(list(losses.values()), device=accelerator.device), "mean")
        losses = dict(zip(losses, mean.tolist(), strict=True))
    if isinstance(model, FSDPModule):
        average(method.model, accelerator)
    return losses


def losses_on(
    method: Method, task: Task, accelerator: Accelerator, parts: Sequence[list[int]], batch_size: int
) -> list[Callable[[], torch.Tensor]]:
    """Return for each list of examples what runs the model on this process's share of them, at most one batch."""

    def loss(examples: list[int]) -> torch.Tensor:
        own = examples[accelerator.process_index :: accelerator.num_processes] or examples[:1]
        chosen = [task.train_set[i] for i in own[:batch_size]]
        with accelerator.autocast():
            return task.loss(method.model, send_to_device(task.collate(chosen), accelerator.device))

    return [partial(loss, examples) for examples in parts]


def _backward(accelerator: Accelerator, share: float, loss: torch.Tensor) -> None:
    accelerator.backward(loss * share)


def installed(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None
