"""The graph pass on one page: factors -> graph -> filter -> coordinator -> factors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch_geometric.data import Data
from transformers.integrations import is_deepspeed_zero3_enabled

from structlora_pyg.data.adapters import AdapterSet
from structlora_pyg.data.graph_builder import GraphBuilder
from structlora_pyg.nn.bottleneck import Information
from structlora_pyg.nn.lift import Lift
from structlora_pyg.tuner.alarms import Alarms
from structlora_pyg.tuner.changes import Changes
from structlora_pyg.tuner.distributed import keep_whole, whole
from structlora_pyg.tuner.edge_log import EdgeLog
from structlora_pyg.tuner.gradients import GradientSketch
from structlora_pyg.tuner.layers import Factor, FusedLinear
from structlora_pyg.tuner.rank_codes import RankCodes
from structlora_pyg.tuner.shared_pass import Lifted, SharedPass


class GraphPass(nn.Module):
    """Owns the stages and runs them, once per forward of the adapted model, from a hook on the base model.

    It counts optimizer steps by itself (`structlora_pyg.tuner.changes`); warm-up, gate noise and edge refreshes follow
    that count, so no training loop has to call anything.

    Args:
        adapters: The adapters; their layers' ``lora_A`` and ``lora_B`` become `Factor` modules.
        graph: Builds the `Data`.
        stages: The filter, then any number of ``Data -> Data`` modules, the coordinator last.
        lift: Turns messages back into factors.
        information: The auxiliary loss.
        sketch: Gradient edges, or None for edge sets without.
        warmup_steps: Optimizer steps of plain LoRA at the start.
        ramp_steps: Optimizer steps over which the auxiliary loss then reaches its weight.
        refresh_every: Optimizer steps between refreshes of the gradient edges, and between looks for alarms.
        alarms: What notices that training silently goes wrong.

    Attributes:
        edge_log: How the edges changed, see `structlora_pyg.tuner.edge_log.EdgeLog`.
    """

    def __init__(
        self,
        adapters: AdapterSet,
        graph: GraphBuilder,
        stages: list[nn.Module],
        lift: Lift,
        information: Information,
        sketch: GradientSketch | None = None,
        warmup_steps: int = 20,
        ramp_steps: int = 80,
        refresh_every: int = 50,
        alarms: Alarms | None = None,
    ) -> None:
        super().__init__()
        self.adapters = adapters
        self.graph, self.stages, self.lift, self.information = graph, nn.ModuleList(stages), lift, information
        self.sketch = sketch
        self.edge_log = EdgeLog()
        self.warmup_steps, self.ramp_steps, self.refresh_every = warmup_steps, ramp_steps, refresh_every
        self.alarms = Alarms() if alarms is None else alarms
        self.step = 0  # optimizer steps seen
        self.passes = 0  # graph passes run
        self.changes = Changes(adapters, self)
        self.in_forward = False
        self.ready = True  # False: the start of lora_A still has to be computed
        self._made_at = -1
        self._watched_step = -1
        self._data: Data | None = None
        self._codes = RankCodes()
        self._labels: Tensor | None = None
        self._share: float | Tensor = 1.0
        self._losses: dict[str, Tensor] = {}
        self._shared = SharedPass()
        name = adapters.adapter_name
        for index, layer in enumerate(adapters.layers.values()):
            layer.lora_A[name] = Factor(layer.lora_A[name], self, position=index)
            layer.lora_B[name] = Factor(layer.lora_B[name], self)
        self.alarms.edges(self)
        _LIVE.add(self)
        self.register_state_dict_pre_hook(_before_saving)
        self.register_load_state_dict_post_hook(_after_loading)

    # -- the graph pass -----------------------------------------------------------------------------------------

    def forward(self) -> tuple[Data, Lifted]:
        """Return the coordinated graph and, per shape, the coordinated factors A' (n, r, d_in), B' (n, d_out, r)."""
        factors = list(self.adapters.factors(self.graph.scaling.device))
        data = self.graph(factors)
        data.active, data.step = self.active, self.step
        for stage in self.stages:
            data = stage(data)
        return data, [self._lift(k, data, A, B) for k, (_, A, B) in enumerate(factors)]

    @torch.no_grad()
    def evaluated(self) -> tuple[Data, Lifted]:
        """Return what `forward` does, in eval mode, in float32 and without gradients."""
        device = self.graph.scaling.device.type
        with whole(self._read()), evaluating(self), torch.autocast(device, enabled=False):
            self.count_steps()
            self._align()
            return self()

    def _read(self) -> list[nn.Parameter]:
        """Return every parameter that the graph pass reads."""
        return [*self.adapters.parameters(), *self.parameters()]

    def _lift(self, k: int, data: Data, A: Tensor, B: Tensor) -> tuple[list[int], Tensor, Tensor]:
        gate = self.graph.of_group(k, data.gate)
        group = self.adapters.groups[k]
        if "message" not in data or not self.active:
            # All parameters take part in every backward pass, as DistributedDataParallel demands.
            idle = [*self.lift.parameters(), *([data.message] if "message" in data else [])]
            return group, A, B * gate.unsqueeze(1) + 0.0 * sum(t.sum() for t in idle)
        code_A, code_B = self.graph.of_group(k, data.code_A), self.graph.of_group(k, data.code_B)
        scaling = self.graph.of_group(k, data.scaling)[:, 0].view(-1, 1, 1)
        message = self.graph.code_of_group(k, data.message) / scaling
        encoding = self.graph.encoding
        P, Q = encoding.basis("in", A.size(-1)), encoding.basis("out", B.size(-2))
        return group, *self.lift(A, B, gate, code_A, code_B, message, P, Q)

    @torch.compiler.disable
    def run(self) -> None:
        """Run the graph pass in float32 and hand every layer its factors."""
        if not self.ready:
            raise RuntimeError(
                "init_lora_weights='gradient' was asked for, but no gradients were given; pass "
                "get_structlora_model(base, config, train_step=...)"
            )
        with torch.autocast(self.graph.scaling.device.type, enabled=False):
            self._distribute(self._shared.factors(self._pass) if self._shared.open else self._pass())
        self._made_at = self.changes.stamp()

    def _pass(self) -> Lifted:
        self._data, lifted = self()
        self.passes += 1
        return lifted

    @contextmanager
    def micro_batch(self, share: float, last: bool) -> Iterator[None]:
        """Let the forwards of one optimizer step share a graph pass; each runs, with its backward pass, within this.

        Their factors are the same, and so is the auxiliary loss. Where that depends on the examples (rank codes,
        labels), every forward keeps a graph pass of its own.

        Args:
            share: What the loss of this micro-batch is multiplied by.
            last: Whether the optimizer steps next.
        """
        information = self.information
        if not information.needs_codes and information.label_term in ("none", "task"):
            self._shared.share, self._shared.last, self._shared.open = share, last, True
        try:
            yield
        finally:
            self._shared.open = False
            if last:
                self._shared = SharedPass()

    def _distribute(self, lifted: Lifted) -> None:
        """Hand the factors to the layers, cast once per shape to the type the layer computes in."""
        name = self.adapters.adapter_name
        parts: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
        for group, A, B in lifted:
            first = self.adapters.layers[self.adapters[group[0]].layer]
            dtype = _compute_dtype(first, name)
            columns = B.to(dtype).mT.contiguous().mT  # the layout of `layers.AdaptedLinear`
            for i, a, b in zip(group, A.to(dtype).unbind(), columns.unbind(), strict=True):
                parts.setdefault(self.adapters[i].layer, []).append((i, a, b))
        for path, pieces in parts.items():
            layer = self.adapters.layers[path]
            weight = layer.lora_A[name].weight
            a, b = join(self.adapters, pieces, layer.out_features)
            layer.lora_A[name].set(a.to(weight.device))
            layer.lora_B[name].set(b.to(weight.device))
            self.alarms.listen(path, b)

    # -- when it runs ---------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Pre-forward hook of the base model."""
        if self._switched_off():
            return  # the auxiliary loss of the forward before stays, as for a reference model within one loss
        self.in_forward = True
        self.train(module.training)  # the base decides, also when only it was switched
        labels = kwargs.get("labels")
        self._labels = labels if isinstance(labels, Tensor) else None  # detectors take a list of dicts
        self._codes = RankCodes(kwargs.get("attention_mask"))
        self._share, self._losses = _share_of_step(kwargs), {}
        if is_deepspeed_zero3_enabled():
            keep_whole(module, self._read())
        self.count_steps()  # in evaluation too: what is evaluated is what would be exported
        if self.training:
            self.alarms.before_forward(self)
            changed = self._refresh_edges()
        self._align()
        if self.training or torch.is_grad_enabled() or self._stale():
            self.run()
        if self.training:
            self._log_edges(changed)
            if self.step % self.refresh_every == 0:
                self.alarms.after_pass(self)

    @torch.compiler.disable
    def after_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook of the base model: add the auxiliary loss to an output that carries ``loss``."""
        self.in_forward = False
        if self.sketch is not None:
            self.sketch.close()
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if not isinstance(loss, Tensor) or not self.training or self._switched_off():
            return None
        self._losses["task"] = loss.detach()
        extra = self.auxiliary_loss().to(loss.device) * self._share
        if self.information.label_term == "task":
            extra = extra + self.ramp * self.information.gamma * loss
        loss = loss + extra.to(loss.dtype)
        if isinstance(output, dict):
            output["loss"] = loss
        elif hasattr(output, "_replace"):  # a named tuple
            output = output._replace(loss=loss)
        else:
            output.loss = loss
        return output

    @torch.compiler.disable
    def auxiliary_loss(self, labels: Tensor | None = None) -> Tensor:
        """Return the auxiliary loss of the last forward with the adapter, a scalar; 0 in eval mode and during warm-up.

        Args:
            labels: (batch,) labels for the label term, where the forward was not given them as ``labels``.

        Raises:
            RuntimeError: Before the first forward; if a label term is on and labels are known from nowhere.
        """
        if self._data is None:
            raise RuntimeError("auxiliary_loss() belongs to a forward pass; call the model first")
        labels = self._labels if labels is None else labels
        term = self.information.label_term
        needed = self.information.needs_codes and self.training
        codes = self._codes.pooled(self.adapters, self.graph) if needed else None
        if self.training and not self.in_forward:
            if labels is None and term in ("decoder", "infonce"):
                raise RuntimeError(f"label_term={term!r} needs the labels: auxiliary_loss(labels)")
            if term == "task" and "task" not in self._losses:
                raise RuntimeError("label_term='task' needs a model whose outputs carry loss; use 'decoder' or 'none'")
        gate = self._data.gate[self._data.scaling != 0]
        labels = None if labels is None else labels.to(gate.device)
        loss = self.ramp * self.information(self._data.kl.squeeze(), gate, codes, labels)
        self._losses["auxiliary"] = loss.detach()
        self.alarms.auxiliary_taken |= self.training and self.active
        return self._shared.once(loss) if self._shared.open else loss

    @property
    def active(self) -> bool:
        """Whether filter and coordinator act: the warm-up is over."""
        return self.step >= self.warmup_steps

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether the auxiliary loss of the last forward depends on anything that is trained."""
        pays = self._data is not None and self._data.kl.requires_grad and self.information.beta > 0
        return pays or self.information.needs_codes

    @property
    def ramp(self) -> float:
        """Weight of the auxiliary loss at this step, in [0, 1]; 0 in eval mode."""
        if not self.training or not self.active:
            return 0.0
        return min(1.0, (self.step - self.warmup_steps + 1) / (self.ramp_steps + 1))

    def count_steps(self) -> None:
        """Advance the step count if the adapter's parameters have been updated since this was last called."""
        self.step += self.changes.since_last_asked()

    def observe(self, factor: Factor, t: Tensor) -> None:
        """Collect the rank codes `t` (batch, ..., r) of a layer where the auxiliary loss reads them."""
        # This order: a compiled layer that reads its position is compiled anew for every layer.
        if self.information.needs_codes and self.in_forward and self.training and factor.position is not None:
            self._codes.add(factor.position, t)

    # -- bookkeeping ----------------------------------------------------------------------------------------------

    def _refresh_edges(self) -> bool:
        """Make gradient edges anew when it is time, and tell whether that was now."""
        if self.sketch is None:
            return False
        changed = False
        if 0 <= self._watched_step < self.step:  # the same in all processes, whatever each of them has seen
            self._watched_step = -1
            changed = self.sketch.finish()
        if changed:
            self._set_gradient_edges()
        if self.step % self.refresh_every == 0:
            self._watched_step = self.step
            self.sketch.open()
        return changed

    def _log_edges(self, changed: bool) -> None:
        """Record the first graph, every refresh of gradient edges, and learned edges every `refresh_every` steps."""
        log, data = self.edge_log, self._data
        due = self.graph.edges == "learned" and self.step % self.refresh_every == 0 and self.step > log.last_step
        if data is not None and (changed or due or log.last_step < 0):
            log.record(self.step, data.edge_index, data.edge_weight if "edge_weight" in data else None)

    def _align(self) -> None:
        """Take the code space from the updates, once, when filter and coordinator begin to act."""
        encoding = self.graph.encoding
        if encoding.kind == "span" and self.active and not bool(encoding.aligned):
            device = self.graph.scaling.device
            pairs = [(self.adapters.pair(a), a.scaling) for a in self.adapters]
            encoding.align([(a.to(device), b.to(device) * scaling) for (a, b), scaling in pairs])

    def _set_gradient_edges(self) -> None:
        if self.sketch is not None:
            g = F.normalize(self.graph.node_gradients(self.sketch.average), dim=1)
            self.graph.set_edges(g @ g.T)

    def _switched_off(self) -> bool:
        """Whether no layer uses the adapter: disabled, merged, or another adapter is active."""
        layer = next(iter(self.adapters.layers.values()))
        name = self.adapters.adapter_name
        return bool(layer.disable_adapters or layer.merged or name not in layer.active_adapters)

    def _stale(self) -> bool:
        name = self.adapters.adapter_name
        missing = any(layer.lora_A[name].effective is None for layer in self.adapters.layers.values())
        return missing or self._made_at != self.changes.stamp()

    def _restored(self) -> None:
        self.changes.loaded()
        if self.sketch is not None and int(self.sketch.refreshes) > 0:
            self._set_gradient_edges()

    def get_extra_state(self) -> Tensor:
        """Return the counters, for ``state_dict``."""
        return torch.tensor([self.step, self.passes, self._watched_step])

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the counters."""
        self.step, self.passes, self._watched_step = state.tolist()

    def _apply(self, fn: Callable, recurse: bool = True) -> GraphPass:
        """Follow moves to a device and to float64, but stay in float32 where the model goes to half precision."""

        def keep_precision(t: Tensor) -> Tensor:
            moved = fn(t)
            return t.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        self.changes.moved()
        return super()._apply(keep_precision, recurse)

    def __getstate__(self) -> dict[str, Any]:
        self.count_steps()  # copies begin with other version counters and could not tell the last step
        state = self.__dict__.copy()
        fresh: dict[str, Any] = {
            "_data": None,
            "_codes": RankCodes(),
            "_labels": None,
            "_losses": {},
            "_shared": SharedPass(),
        }
        return {**state, **fresh, "in_forward": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _LIVE.add(self)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode for a while."""
    was = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was)


_LIVE: weakref.WeakSet[GraphPass] = weakref.WeakSet()


def _after_optimizer_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
    for graph_pass in _LIVE:
        if not graph_pass.changes.after_step(optimizer):
            continue
        if graph_pass.sketch is not None:
            graph_pass.sketch.gather()
        for layer in graph_pass.adapters.layers.values():  # compiled code cannot tell that they are old
            for factors in (layer.lora_A, layer.lora_B):
                factors[graph_pass.adapters.adapter_name].set(None)


register_optimizer_step_post_hook(_after_optimizer_step)


def _before_saving(module: GraphPass, *_: Any) -> None:
    module.count_steps()  # the last optimizer step has had no forward after it that would count it


def _after_loading(module: GraphPass, _: Any) -> None:
    module._restored()


def join(adapters: AdapterSet, pieces: list[tuple[int, Tensor, Tensor]], out_features: int) -> tuple[Tensor, Tensor]:
    """Return A (r, d_in) and B (d_out, r) of a layer from the factors of its slices, zero outside each slice's rows."""
    if len(pieces) == 1 and pieces[0][2].size(0) == out_features:
        return pieces[0][1], pieces[0][2]
    pieces = sorted(pieces, key=lambda piece: adapters[piece[0]].ranks.start)
    rows = [adapters[i].rows for i, _, _ in pieces]
    padded = [F.pad(b.mT, (at.start, out_features - at.stop)) for at, (_, _, b) in zip(rows, pieces, strict=True)]
    return torch.cat([a for _, a, _ in pieces]), torch.cat(padded).mT


def _compute_dtype(layer: Any, name: str) -> torch.dtype:
    """Return the type of the base weight for our fused layer, of the adapter's own weights for PEFT's layers."""
    base = getattr(layer.get_base_layer(), "weight", None)
    if type(layer) is FusedLinear and isinstance(base, Tensor) and base.is_floating_point():
        return base.dtype
    return layer.lora_A[name].weight.dtype


def _share_of_step(kwargs: dict[str, Any]) -> float | Tensor:
    """Return this forward's share of an optimizer step.

    `transformers.Trainer` gives ``num_items_in_batch``, the number of labels in all micro-batches, and then sums
    losses. The shares of the micro-batches add up to 1, so the auxiliary loss keeps its weight.
    """
    total, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if total is None or not isinstance(labels, Tensor):
        return 1.0
    return (labels != -100).sum() / total
