"""LoRA + Cos and LoRA + Laplacian: fixed penalties that make neighbouring updates alike.

StructLoRA (arXiv 2603.14228, appendix) names both as comparisons without their formulas; these are our choice. With
u_i = vec(s_i B_i A_i) both follow from the Gram matrix of the updates, without any dense update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn

from structlora_pyg.analysis.structure import adjacent_pairs, gram_matrix
from structlora_pyg.data.adapters import AdapterSet
from structlora_pyg.study.methods.base import Adapted, Run, register
from structlora_pyg.study.methods.lora import PlainLora
from structlora_pyg.tuner.layers import Factor

EPS = 1e-12  # in units of a squared norm: where updates are 0, as at the start, values and gradients stay finite


class CosinePenalty:
    r"""Penalty on the angle between updates of one role at consecutive depths.

    .. math:: \sum_{roles} \frac{1}{N - 1} \sum_{l=1}^{N-1} \left(1 - \cos(u_l, u_{l+1})\right)

    with N adapters per role. Calling it returns the penalty, a float64 scalar in [0, 2 x number of roles]; where
    updates are 0 it is 1 per pair and its gradient 0::

        penalty = CosinePenalty(model)
        loss = model(**batch).loss + 0.1 * penalty()

    Args:
        model: A `peft.PeftModel` with LoRA adapters on linear layers; of a `StructLoraModel`, the coordinated factors
            of the last forward are compared.
        fused_slices: Slices of fused projections that are adapters of their own.
        adapter_name: Which adapter.

    Raises:
        ValueError: If no two updates can be compared.
    """

    def __init__(
        self, model: PeftModel, fused_slices: Sequence[str] | None = None, adapter_name: str = "default"
    ) -> None:
        self.adapters = AdapterSet(model.get_base_model(), adapter_name, fused_slices)
        pairs = adjacent_pairs(self.adapters)
        if not pairs:
            raise ValueError(
                f"the penalty has nothing to compare: no two of the {len(self.adapters)} adapters have one role and "
                f"shape at consecutive depths; roles: {', '.join(self.adapters.roles)}"
            )
        self.pairs = torch.tensor(pairs).T
        roles = [self.adapters[i].role for i, _ in pairs]
        self.weight = torch.tensor([1 / roles.count(role) for role in roles], dtype=torch.float64)

    def gram(self) -> Tensor:
        """Return the (N, N) inner products of the updates in float64, differentiable."""
        name, updates = self.adapters.adapter_name, []
        for a in self.adapters:
            layer = self.adapters.layers[a.layer]
            A, B = _current(layer.lora_A[name]), _current(layer.lora_B[name])
            updates.append((A[a.ranks], B[a.rows, a.ranks] * a.scaling))
        return gram_matrix(updates)

    def __call__(self) -> Tensor:
        """Return the penalty of the current factors."""
        gram = self.gram()
        i, j = self.pairs.to(gram.device)
        square = gram.diagonal().clamp(min=0)
        # The root is taken of a number > 0, so that its gradient stays finite where an update is 0.
        cosine = gram[i, j] / (square[i] * square[j] + EPS**2).sqrt()
        return (self.weight.to(gram.device) * (1 - cosine)).sum()


class LaplacianPenalty(CosinePenalty):
    r"""Penalty on the distance between updates of one role at consecutive depths.

    .. math:: \frac{\sum_{i \sim j} \|u_i - u_j\|^2}{\frac1N \sum_i \|u_i\|^2} = \frac{tr(L G)}{tr(G) / N}

    with the Gram matrix G and the graph Laplacian L. Calling it returns the penalty, a float64 scalar >= 0. Without
    the denominator it would be smallest for updates that are 0, hence weight decay as well.
    """

    def __call__(self) -> Tensor:
        """Return the penalty of the current factors."""
        gram = self.gram()
        i, j = self.pairs.to(gram.device)
        square = gram.diagonal()
        return (square[i] + square[j] - 2 * gram[i, j]).sum() / (square.mean() + EPS)


@register("lora_cos")
class LoraCosine(PlainLora):
    """LoRA with a penalty on the angle between updates of neighbouring layers."""

    own_options = ("weight",)
    term: ClassVar[type[CosinePenalty]] = CosinePenalty

    def build(self, base: nn.Module, calibrate: Run, train_step: Run) -> Adapted:
        """Return the base with LoRA adapters, whose updates `penalty` compares."""
        adapted = super().build(base, calibrate, train_step)
        self.compare = self.term(adapted.model, self.adapter.fused_slices)
        return adapted

    def penalty(self) -> Tensor:
        """Return the weighted penalty."""
        return self.options.weight * self.compare().float()


@register("lora_laplacian")
class LoraLaplacian(LoraCosine):
    """LoRA with a penalty on the distance between updates of neighbouring layers."""

    term = LaplacianPenalty


def _current(factor: Any) -> Tensor:
    return factor.current() if isinstance(factor, Factor) else factor.weight
