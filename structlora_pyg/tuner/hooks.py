"""When the graph pass runs: before every forward of the base model that needs fresh factors.

Everything follows from hooks: on the base model, on the graph pass, and on all optimizers. Optimizer steps are
detected, so that warm-up, gate noise and edge refreshes work in any training loop, which has to call nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from transformers.integrations import is_deepspeed_zero3_enabled

from structlora_pyg.nn.bottleneck import RankCodes
from structlora_pyg.tuner.alarms import Alarms
from structlora_pyg.tuner.distributed import keep_whole
from structlora_pyg.tuner.factor import Factor, coordinate, transformed
from structlora_pyg.tuner.graph_pass import GraphPass, Lifted, check_finite, plain_factors
from structlora_pyg.tuner.layers import Attention, FusedLinear, compute_dtype, draws_once, serve
from structlora_pyg.tuner.updates import Updates, begin_anew, share_of_step, tell_of_steps


class PassHooks:
    """Runs a graph pass before the forwards of a model and hands every layer its factors.

    Args:
        graph_pass: The graph pass; the ``lora_A`` and ``lora_B`` of its adapters become `Factor` modules.
        base: The module whose forwards it serves, with the adapters inside.
        refresh_every: Optimizer steps between refreshes of the gradient edges, and between looks for alarms.
        alarms: What notices that training silently goes wrong.

    Attributes:
        passes: Graph passes run.
        data: Graph of the last pass; None before the first.
        losses: Parts of the last training loss, scalars: ``auxiliary``, and ``task`` where the output carried a loss.
        in_forward: Whether the base model is in its forward.
        teaching: Whether forwards are no part of training: nothing is counted, refreshed or watched.
        restart: Whether factors were loaded without the state of their graph pass, as those of a plain LoRA are.
    """

    data: Data | None
    losses: dict[str, Tensor]
    _codes: RankCodes
    _labels: Tensor | None
    _share: float | Tensor
    _levels: dict[str, Tensor] | None  # noise levels of every layer, where layers run with their own parameters
    _made: dict[str, list[int]]  # and the layers whose factors have to be made all the same, with their adapters

    def __init__(
        self, graph_pass: GraphPass, base: nn.Module, refresh_every: int = 50, alarms: Alarms | None = None
    ) -> None:
        self.graph_pass, self.refresh_every = graph_pass, refresh_every
        self.alarms = Alarms() if alarms is None else alarms
        self.passes, self.in_forward, self.restart, self.teaching = 0, False, False, False
        self._made_at = -1
        self.__dict__.update(_nothing_seen())
        adapters, self.reading = graph_pass.adapters, 0
        for index, path in enumerate(adapters.layers):
            for side, position in zip(adapters.sides(path), (index, None), strict=True):
                coordinate(side, self, adapters.adapter_name, position)
        self.factors: list[Factor] = [side for path in adapters.layers for side in adapters.sides(path)]
        self.updated = Updates(self.factors, graph_pass)
        self.alarms.edges(graph_pass.graph)
        others = [layer for layer in adapters.layers.values() if not isinstance(layer, (FusedLinear, Attention))]
        self._handles = [
            *(handle for layer in others for handle in serve(layer, self)),
            base.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            base.register_forward_hook(self.after_forward, with_kwargs=True, always_call=True),
            graph_pass.register_forward_pre_hook(self._before_pass),
            graph_pass.register_state_dict_pre_hook(self._before_pass),
            graph_pass.register_load_state_dict_pre_hook(self._before_loading),
            graph_pass.register_load_state_dict_post_hook(self._after_loading),
        ]
        tell_of_steps(self)

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()

    @torch.compiler.disable
    def run(self) -> None:
        """Run the graph pass in float32 and hand every layer its factors.

        A pass that gives noise levels alone runs once, and again when they have been decided anew; between, the layers
        run with their own parameters.
        """
        graph_pass = self.graph_pass
        idle = graph_pass.leaves_updates and not self.restart and not self.teaching
        with torch.autocast(graph_pass.graph.scaling.device.type, enabled=False):
            if idle and (self._levels is not None or (graph_pass.training and not transformed())):
                self._rest()
            else:
                self._levels = None
                self.data, lifted = graph_pass()
                self._distribute(lifted)
                self._made_at = self.updated.stamp()
        self.passes += 1

    def plain(self) -> dict[Factor, Tensor]:
        """Return what every factor is in the plain LoRA that computes the same in evaluation, at least float32.

        They have the shapes of the parameters, but for the directions that a dense lift adds.

        Raises:
            ValueError: Factors that are not finite.
        """
        factors, _ = plain_factors(self.graph_pass)
        check_finite(factors)
        sides = self.graph_pass.adapters.sides
        pairs = [(side, f) for path, pair in factors.items() for side, f in zip(sides(path), pair, strict=True)]
        return {side: f.view_as(side.raw) if f.numel() == side.raw.numel() else f for side, f in pairs}

    def loaded(self) -> None:
        """Note that factors have come from a state dict; if no state of the graph pass follows, it begins anew."""
        self.restart, self._levels = True, None

    def _distribute(self, lifted: Lifted) -> None:
        """Hand the factors to the layers, cast once per shape to the type the layer computes in."""
        adapters = self.graph_pass.adapters
        parts: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
        levels = self.graph_pass.noise_of(self.data, lifted) if self.graph_pass.training and self.data else {}
        for group, A, B in lifted:
            path = adapters[group[0]].layer
            dtype = compute_dtype(adapters.layers[path], adapters.raw(path)[0].dtype)
            columns = B.to(dtype).mT.contiguous().mT  # the layout of `layers.AdaptedLinear`
            for i, a, b in zip(group, A.to(dtype).unbind(), columns.unbind(), strict=True):
                parts.setdefault(adapters[i].layer, []).append((i, a, b))
                if self.graph_pass.sketch is not None:
                    self.graph_pass.sketch.listen(i, a, b)
        for path, pieces in parts.items():
            self._set(path, pieces, levels.get(path))

    def _rest(self) -> None:
        """Let the layers run with their own parameters, and with the noise levels of the last pass."""
        adapters, training = self.graph_pass.adapters, self.graph_pass.training
        if self._levels is None:
            with torch.no_grad():  # what decides the levels is not taught by the loss of training
                self.data, lifted = self.graph_pass()
            self._levels, self._made = self.graph_pass.noise_of(self.data, lifted), {}
            for i, adapter in enumerate(adapters):
                self._made.setdefault(adapter.layer, []).append(i)
            for path, own in list(self._made.items()):
                (down, up), level = adapters.sides(path), self._levels.get(path)
                parts = sum(part.numel() for part in adapters.pair(adapters[own[0]]))
                once = level is not None and draws_once(adapters.layers[path], adapters.adapter_name)
                if parts == down.raw.numel() + up.raw.numel() and not once:
                    del self._made[path]
                    down.rest(None if level is None else level.to(down.raw.device))
                    up.rest()
                    self.alarms.listen(path, up.raw)
        if transformed():
            self.alarms.stop_listening()  # gradients come by other ways
        for path, own in self._made.items():
            pieces = [(i, *adapters.pair(adapters[i])) for i in own]
            self._set(path, pieces, self._levels.get(path) if training else None)

    def _set(self, path: str, pieces: list[tuple[int, Tensor, Tensor]], level: Tensor | None) -> None:
        """Set the factors of a layer, from those of its adapters, and the noise level (r, 1) of its rank codes."""
        adapters = self.graph_pass.adapters
        (down, up), (a, b) = adapters.sides(path), adapters.join(path, pieces)
        if level is not None and draws_once(adapters.layers[path], adapters.adapter_name):
            a, level = a * (1 + level * torch.randn_like(level)).to(a), None
        down.set(a.to(down.raw.device), None if level is None else level.to(down.raw.device))
        up.set(b.to(up.raw.device))
        self.alarms.listen(path, b)

    @torch.compiler.disable
    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Pre-forward hook of the base model."""
        if self.graph_pass.adapters.switched_off:
            return  # the auxiliary loss of the forward before stays, as for a reference model within one loss
        graph_pass = self.graph_pass
        self.in_forward = True
        if graph_pass.training != module.training:
            graph_pass.train(module.training)  # the base decides, also when only it was switched
        labels = kwargs.get("labels")
        self._labels = labels if isinstance(labels, Tensor) else None  # detectors take a list of dicts
        self._codes = RankCodes(kwargs.get("attention_mask"))
        self._share, self.losses = share_of_step(kwargs), {}
        if is_deepspeed_zero3_enabled():
            keep_whole(module, graph_pass.reads())
        if self.teaching:
            return self.run()
        self.count_steps()  # in evaluation too: what is evaluated is what would be exported
        wrapped = transformed()  # parameters, and all that is made of them, are not what they will be afterwards
        if module.training and not wrapped:
            self.alarms.before_forward(graph_pass, self._has_auxiliary_loss())
            self._refresh_edges()
        if module.training or torch.is_grad_enabled() or wrapped or self._stale():
            self.run()
        if module.training and not wrapped and graph_pass.step % self.refresh_every == 0 and self.data is not None:
            self.alarms.after_pass(graph_pass, self.data)

    @torch.compiler.disable
    def after_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook of the base model: add the auxiliary loss to an output that carries ``loss``."""
        self.in_forward = False
        graph_pass = self.graph_pass
        if graph_pass.sketch is not None:
            graph_pass.sketch.close()
        if transformed():
            self._forget()
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if not isinstance(loss, Tensor) or not graph_pass.training or self.graph_pass.adapters.switched_off:
            return None
        self.losses["task"] = loss.detach()
        extra = self.auxiliary_loss().to(loss.device) * self._share
        if graph_pass.information.label_term == "task":
            extra = extra + graph_pass.ramp * graph_pass.information.gamma * loss
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
        """Return the auxiliary loss of the last forward; see `StructLoraModel.auxiliary_loss`."""
        if self.data is None:
            raise RuntimeError("auxiliary_loss() belongs to a forward pass; call the model first")
        graph_pass, information = self.graph_pass, self.graph_pass.information
        training, term = graph_pass.training, information.label_term
        labels = self._labels if labels is None else labels
        codes = None
        if information.needs_codes and training:
            codes = self._codes.pooled(graph_pass.adapters, graph_pass.graph)
        if training and not self.in_forward:
            if labels is None and term in ("decoder", "infonce"):
                raise RuntimeError(f"label_term={term!r} needs the labels: auxiliary_loss(labels)")
            if term == "task" and "task" not in self.losses:
                raise RuntimeError("label_term='task' needs a model whose outputs carry loss; use 'decoder' or 'none'")
        # A mask as index makes a GPU wait; only codes are weighed by gates.
        gate = self.data.gate if codes is None else self.data.gate[self.data.scaling != 0]
        labels = None if labels is None else labels.to(gate.device)
        loss = graph_pass.ramp * information(self.data.kl.squeeze(), gate, codes, labels)
        self.losses["auxiliary"] = loss.detach()
        self.alarms.auxiliary_taken |= training and graph_pass.active
        return loss

    def _has_auxiliary_loss(self) -> bool:
        """Whether the auxiliary loss of the last forward depends on anything that is trained."""
        information = self.graph_pass.information
        pays = self.data is not None and self.data.kl.requires_grad and information.beta > 0
        return pays or information.needs_codes

    def observe(self, factor: Factor, t: Tensor) -> None:
        """Collect the rank codes `t` (batch, ..., r) of a layer where the auxiliary loss reads them."""
        # This order: a compiled layer that reads its position is compiled anew for every layer.
        wanted = self.graph_pass.information.needs_codes and self.in_forward and self.graph_pass.training
        if wanted and factor.position is not None:
            self._codes.add(factor.position, t)

    def count_steps(self) -> None:
        """Advance the step count if the adapter's parameters have been updated since this was last called."""
        if self.teaching:
            return
        self.graph_pass.step += self.updated.since_last_asked()

    def finish(self) -> None:
        """Count the last step, which no forward has followed, and look at what was trained."""
        self.count_steps()
        self.alarms.left_out(self.graph_pass)

    @property
    def updates(self) -> int:
        """Updates of the adapters that version counters do not show; part of the age of a factor."""
        return self.updated.count

    def forget(self) -> None:
        """Make factors anew at the next forward, and take the parameters as they are: no optimizer moved them."""
        self.updated.forget()
        self.count_steps()
        self._made_at, self._levels = -1, None

    def _refresh_edges(self) -> None:
        """Make gradient edges anew when it is time."""
        graph_pass, sketch = self.graph_pass, self.graph_pass.sketch
        if sketch is None:
            return
        # The same in all processes, whatever each of them has seen.
        if 0 <= sketch.opened_at < graph_pass.step and sketch.finish():
            graph_pass.set_gradient_edges()
        if graph_pass.step % self.refresh_every == 0:
            sketch.open(graph_pass.step)

    def _stale(self) -> bool:
        factors = [f for f in self.factors if not f.own]
        return any(f.effective is None for f in factors) or (bool(factors) and self._made_at != self.updated.stamp())

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Note a step of any optimizer."""
        self.alarms.saw(optimizer)
        if not self.updated.after_step(optimizer):
            return
        graph_pass = self.graph_pass
        if graph_pass.sketch is not None:
            graph_pass.sketch.gather()
        self._forget()  # compiled code cannot tell that they are old

    def _forget(self) -> None:
        """Take the factors away from the layers."""
        for factor in self.factors:
            factor.drop()

    def _before_pass(self, *_: Any) -> None:
        if self.restart:
            self.restart = False
            begin_anew(self.graph_pass)
        self.count_steps()  # the last optimizer step may have had no forward after it that would count it

    def _before_loading(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        if any(name.startswith(prefix) for name in state_dict):
            self.restart = False

    def _after_loading(self, *_: Any) -> None:
        self.updated.forget()
        self._levels = None
        if self.graph_pass.sketch is not None and int(self.graph_pass.sketch.refreshes) > 0:
            self.graph_pass.set_gradient_edges()

    def __getstate__(self) -> dict[str, Any]:
        self.count_steps()  # copies begin with other version counters and could not tell the last step
        return {**self.__dict__, **_nothing_seen(), "in_forward": False, "reading": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        tell_of_steps(self)


def _nothing_seen() -> dict[str, Any]:
    """Return the attributes that belong to the last forward, before there was one."""
    return {
        "data": None,
        "losses": {},
        "_codes": RankCodes(),
        "_labels": None,
        "_share": 1.0,
        "_levels": None,
        "_made": {},
    }
