"""LoRA + Cos and LoRA + Laplacian: fixed penalties that make neighbouring updates alike.

StructLoRA (arXiv 2603.14228, appendix) names both as comparisons without their formulas; these are our choice. With
u_i = vec(s_i B_i A_i) both follow from the Gram matrix of the updates, without any dense update. Neighbours are updates
of one role and shape at consecutive depths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from structlora_pyg.analysis.structure import adjacent_pairs, gram_matrix
from structlora_pyg.checks import ConfigError
from structlora_pyg.data.adapters import AdapterSet
from structlora_pyg.study.methods import ADAPTER, Run, register
from structlora_pyg.study.methods.lora import PlainLora
from structlora_pyg.tuner.factor import Factor

EPS = 1e-12  # in units of a squared norm: where updates are 0, as at the start, values and gradients stay finite


@register("lora_cos")
class LoraCosine(PlainLora):
    r"""LoRA with a penalty on the angle between updates of neighbouring layers.

    .. math:: \sum_{roles} \frac{1}{N - 1} \sum_{l=1}^{N-1} \left(1 - \cos(u_l, u_{l+1})\right)

    with N adapters per role, in [0, 2 x number of roles]; where updates are 0 it is 1 per pair and its gradient 0.
    """

    own_options = ("weight",)

    def build(self, base: nn.Module, calibrate: Run, train_step: Run) -> nn.Module:
        """Return the base with LoRA adapters.

        Raises:
            ConfigError: If no two updates can be compared.
        """
        model = super().build(base, calibrate, train_step)
        self.adapters = AdapterSet(base, ADAPTER, self.adapter.fused_slices)
        pairs = adjacent_pairs(self.adapters)
        if not pairs:
            roles = ", ".join(self.adapters.roles)
            why = "no two adapters have one role and shape at consecutive depths"
            raise ConfigError([f"method.name={self.name} has nothing to compare: {why}; roles: {roles}"])
        self.pairs = torch.tensor(pairs).T
        names = [self.adapters[i].role for i, _ in pairs]
        self.share = torch.tensor([1 / names.count(name) for name in names], dtype=torch.float64)
        return model

    def penalty(self) -> Tensor:
        """Return the weighted penalty of the current factors, a scalar."""
        updates = []
        for a in self.adapters:
            layer = self.adapters.layers[a.layer]
            A, B = _current(layer.lora_A[ADAPTER]), _current(layer.lora_B[ADAPTER])
            updates.append((A[a.ranks], B[a.rows, a.columns] * a.scaling))
        gram = gram_matrix(updates)
        return self.options.weight * self.compare(gram, *self.pairs.to(gram.device)).float()

    def compare(self, gram: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Return the penalty for the inner products (N, N) of the updates and the pairs (E,), (E,) of neighbours."""
        square = gram.diagonal().clamp(min=0)
        # The root is taken of a number > 0, so that its gradient stays finite where an update is 0.
        cosine = gram[i, j] / (square[i] * square[j] + EPS**2).sqrt()
        return (self.share.to(gram.device) * (1 - cosine)).sum()


@register("lora_laplacian")
class LoraLaplacian(LoraCosine):
    r"""LoRA with a penalty on the distance between updates of neighbouring layers.

    .. math:: \frac{\sum_{i \sim j} \|u_i - u_j\|^2}{\frac1N \sum_i \|u_i\|^2} = \frac{tr(L G)}{tr(G) / N}

    with the Gram matrix G and the graph Laplacian L. Without the denominator it would be smallest for updates that are
    0, hence weight decay as well.
    """

    def compare(self, gram: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Return the penalty for the inner products (N, N) of the updates and the pairs (E,), (E,) of neighbours."""
        square = gram.diagonal()
        return (square[i] + square[j] - 2 * gram[i, j]).sum() / (square.mean() + EPS)


def _current(factor: Any) -> Tensor:
    return factor.current() if isinstance(factor, Factor) else factor.weight
