"""Filters: layers of tensors, and transforms ``Data -> Data``, that gate the rank-one directions of every update.

A filter sets ``gate`` in [0, 1] (N, D) and ``kl`` (1,), and replaces ``x`` by the code of the filtered update
``s B diag(m) A``, plus whatever transforms have added to it before. It never changes its input. Two graph attributes
steer it where present: ``active`` (False in warm-up: all gates are 1) and ``step`` (int: gate noise is a function of
seed and step, so that every process and every micro-batch of an optimizer step draws the same gates, and a resumed run
the same as an undisturbed one). In a batch of graphs of one model, every graph has its own.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.transforms import BaseTransform

from structlora_pyg.checks import make_part
from structlora_pyg.data.encoding import update_code

STRETCH = (-0.1, 1.1)  # gamma and zeta of arXiv 1712.01312


class Filter(nn.Module, BaseTransform):
    """Base class: subclasses give the gates, this class applies them.

    Args:
        scaling: (N, D) scaling of every direction, 0 where there is none.
        slots: Updates a node holds.

    Attributes:
        noise: Noise level of every direction, >= 0, in the ``level`` (N, D) of the graph.
    """

    exists: Tensor

    def __init__(self, scaling: Tensor, slots: int = 1) -> None:
        super().__init__()
        self.slots, self.noise = slots, 0.0
        self.factor: Tensor | None = None  # (N, D) on top of the gates: what `direction_importance` varies
        self.register_buffer("exists", scaling != 0, persistent=False)

    def gates(self, data: Data) -> tuple[Tensor, Tensor]:
        """Return gates (N, D) and their mean divergence from the prior, a scalar."""
        raise NotImplementedError(f"{type(self).__name__} must define gates(data) -> (gates, divergence)")

    def forward(
        self,
        x: Tensor | Data,
        code_A: Tensor | None = None,
        code_B: Tensor | None = None,
        scaling: Tensor | None = None,
    ) -> Any:
        """Return the filtered `x`; of a graph, a shallow copy with ``gate``, ``kl`` and the filtered ``x``.

        Args:
            x: (N, F) node codes, or a graph with what the other arguments are.
            code_A: (N, D, p_in) codes of the directions in lora_A.
            code_B: (N, D, p_out) codes of the directions in lora_B.
            scaling: (N, D) scaling of every direction.
        """
        if not isinstance(x, Data):
            return self(Data(x=x, code_A=code_A, code_B=code_B, scaling=scaling)).x
        data = x
        if isinstance(data, Batch):  # graphs of the same model, such as recorded steps
            return Batch.from_data_list([self(graph) for graph in data.to_data_list()])
        if data.num_nodes != len(self.exists):
            raise ValueError(
                f"this filter has gates for the {len(self.exists)} nodes of one model, and the graph has "
                f"{data.num_nodes}; make a filter of its own for it, with scaling=graph.scaling"
            )
        gate, divergence = self.gates(data)
        if not data.get("active", True):  # connected, so that every parameter has a gradient at every step
            gate, divergence = torch.ones_like(gate) + 0.0 * gate, 0.0 * divergence
        out = copy.copy(data)
        out.gate = gate * self.exists if self.factor is None else gate * self.exists * self.factor
        out.kl = divergence.view(1)
        if self.noise > 0:
            out.level = self.noise * self.exists.to(data.x)
        out.x = update_code(data.code_A, data.code_B, out.gate * data.scaling, self.slots)
        # What transforms have made of x before stays; without any, this is 0.
        out.x = out.x + (data.x - update_code(data.code_A, data.code_B, data.scaling, self.slots))
        return out


class OpenGates(Filter):
    """All gates open; alone the paper's "without IB" row, with `noise` the default filter."""

    def gates(self, data: Data) -> tuple[Tensor, Tensor]:
        """Return ones and zero."""
        return torch.ones_like(data.scaling), data.scaling.new_zeros(())


class RandomMask(Filter):
    """A fixed random choice of directions, the same number in every update.

    Args:
        scaling: See `Filter`, as `slots`.
        keep: Share of directions kept, in (0, 1]; at least one per update.
        seed: Seed of the choice.
    """

    mask: Tensor

    def __init__(self, scaling: Tensor, slots: int = 1, keep: float = 0.5, seed: int = 0) -> None:
        super().__init__(scaling, slots)
        noise = torch.rand(scaling.shape, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("mask", _keep_top(noise, self.exists.cpu(), slots, keep).to(scaling), persistent=False)

    def gates(self, data: Data) -> tuple[Tensor, Tensor]:
        """Return the fixed mask and zero."""
        return self.mask, self.mask.new_zeros(())


class TopKNorm(Filter):
    """The directions of largest norm ``|b_j| |a_j|``, chosen anew at every step.

    Args:
        scaling: See `Filter`, as `slots`.
        keep: Share of directions kept, in (0, 1]; at least one per update.
    """

    def __init__(self, scaling: Tensor, slots: int = 1, keep: float = 0.5) -> None:
        super().__init__(scaling, slots)
        self.keep = keep

    def gates(self, data: Data) -> tuple[Tensor, Tensor]:
        """Return the mask of the largest directions and zero."""
        norm = (data.code_A.norm(dim=-1) * data.code_B.norm(dim=-1)).detach()
        mask = _keep_top(norm, self.exists, self.slots, self.keep).to(norm)
        return mask, mask.new_zeros(())


class IBFilter(Filter):
    r"""Learned stochastic gates under a prior: the information-bottleneck filter.

    Noise :math:`\ell = \log u - \log(1-u)`, logits :math:`\varphi`:

    - ``hard_concrete``: :math:`s = \sigma((\varphi + \ell)/\tau)`, :math:`m = \mathrm{clip}(1.2 s - 0.1, 0, 1)`
      (arXiv 1712.01312). Exact zeros, so closed directions can be cut out.
    - ``gumbel_sigmoid``: :math:`m = \sigma((\varphi + \ell)/\tau)`. Soft: A and B can grow to undo a small gate.

    In eval mode the noise is absent. ``kl`` is the mean over directions of
    :math:`KL(\mathrm{Bern}(\sigma(\varphi)) \| \mathrm{Bern}(\rho))`, a bound on the information the gates carry.

    Args:
        scaling: See `Filter`.
        slots: See `Filter`.
        kind: ``hard_concrete`` or ``gumbel_sigmoid``.
        prior: :math:`\rho`, probability of an open gate, in (0, 1).
        temperature: :math:`\tau` > 0.
        init_logit: :math:`\varphi` at the start.
        lr_scale: The stored parameter is :math:`(\varphi - \varphi_0) /` `lr_scale`: under Adam the logits then move
            `lr_scale` times as fast as other parameters, in every training loop, and weight decay pulls to the start.
        seed: Seed of the gate noise.
    """

    def __init__(
        self,
        scaling: Tensor,
        slots: int = 1,
        kind: str = "hard_concrete",
        prior: float = 0.5,
        temperature: float = 2.0 / 3.0,
        init_logit: float = 4.0,
        lr_scale: float = 10.0,
        seed: int = 0,
    ) -> None:
        super().__init__(scaling, slots)
        self.kind, self.prior, self.temperature = kind, prior, temperature
        self.init_logit, self.lr_scale, self.seed = init_logit, lr_scale, seed
        self.gate_offset = nn.Parameter(torch.zeros_like(scaling))

    @property
    def logits(self) -> Tensor:
        """Gate logits (N, D)."""
        return self.init_logit + self.lr_scale * self.gate_offset

    def probability_open(self) -> Tensor:
        """Return P(m != 0) of every gate (N, D); 1 for soft gates."""
        if self.kind != "hard_concrete":
            return torch.ones_like(self.gate_offset)
        return torch.sigmoid(self.logits - self.temperature * math.log(-STRETCH[0] / STRETCH[1]))

    def gates(self, data: Data) -> tuple[Tensor, Tensor]:
        """Return sampled (training) or deterministic (eval) gates and the mean divergence from the prior."""
        logits = self.logits
        if self.training:
            noisy = torch.sigmoid((logits + self._noise(data)) / self.temperature)
        else:
            noisy = torch.sigmoid(logits)
        if self.kind == "hard_concrete":
            noisy = (noisy * (STRETCH[1] - STRETCH[0]) + STRETCH[0]).clamp(0.0, 1.0)
        divergence = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log(self.prior)) + torch.sigmoid(-logits) * (
            F.logsigmoid(-logits) - math.log1p(-self.prior)
        )
        return noisy, (divergence * self.exists).sum() / self.exists.sum()

    def _noise(self, data: Data) -> Tensor:
        generator = None
        if "step" in data:  # drawn on the CPU: the same numbers on every kind of device
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(data.step))
        u = torch.rand(self.gate_offset.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
        return torch.logit(u).to(self.gate_offset)

    def extra_repr(self) -> str:
        """Name kind and prior."""
        n, d = self.gate_offset.shape
        return f"nodes={n}, directions={d}, kind={self.kind}, prior={self.prior}"


KINDS: dict[str, type[Filter]] = {
    "none": OpenGates,
    "noise": OpenGates,
    "random_mask": RandomMask,
    "topk_norm": TopKNorm,
    "hard_concrete": IBFilter,
    "gumbel_sigmoid": IBFilter,
}


def make_filter(kind: Any, scaling: Tensor, slots: int = 1, *, noise: float = 0.0, **known: Any) -> nn.Module:
    """Return the filter of a kind; or one of your own: dotted path, class, function or object.

    Args:
        kind: See `structlora_pyg.nn.FilterConfig`.
        scaling: See `Filter`.
        slots: See `Filter`.
        noise: Noise level of every direction, >= 0; ``none`` has none.
        **known: Other arguments, of which a constructor gets what it asks for by name.
    """
    made = make_part(kind, {"scaling": scaling, "slots": slots, "kind": kind, **known}, KINDS, "filter")
    if isinstance(made, Filter) and kind in KINDS and kind != "none":
        made.noise = noise
    return made


def _keep_top(score: Tensor, exists: Tensor, slots: int, keep: float) -> Tensor:
    """Return a mask (N, D) of the top share of the existing directions of every update."""
    n, d = score.shape
    score = score.masked_fill(~exists, -1.0).view(n, slots, d // slots)
    count = exists.view(n, slots, -1).sum(-1, keepdim=True)
    rank = score.argsort(-1, descending=True).argsort(-1)
    return ((rank < (keep * count).ceil().clamp(min=1)) & exists.view(n, slots, -1)).view(n, d)
