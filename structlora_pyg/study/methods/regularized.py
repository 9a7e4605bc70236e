"""LoRA with something beside it in training: random masks and ranks, or a fixed penalty.

LoRA-Dropout (arXiv 2404.09610) and DyLoRA (arXiv 2210.07558) go through PEFT's own door for variants, which replaces
the forward of every LoRA layer, quantised ones and `FusedLinear` too. Parameters and their names stay those of LoRA, so
what PEFT saves is a plain LoRA folder. Masks and ranks have a generator of their own, seeded with ``adapter.seed``, and
are drawn once per training forward of the whole model.

LoRA + Cos and LoRA + Laplacian make neighbouring updates alike. StructLoRA (arXiv 2603.14228, appendix) names both as
comparisons without their formulas; these are our choice. With u_i = vec(s_i B_i A_i) both follow from the Gram matrix
of the updates, without any dense update. Neighbours are updates of one role and shape at consecutive depths.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import get_peft_model_state_dict
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from structlora_pyg.analysis.structure import adjacent_pairs, gram_matrix
from structlora_pyg.checks import ConfigError
from structlora_pyg.data.adapters import AdapterSet
from structlora_pyg.study.methods import ADAPTER, Run, register, write_lora
from structlora_pyg.study.methods.lora import PlainLora
from structlora_pyg.tuner.factor import Factor


class RandomLora(PlainLora, LoraVariant):
    """Base of methods that draw something in every training forward; subclasses implement `draw` and `update`.

    Attributes:
        layers: The adapted layers by path.
        draws: Training forwards seen.
        generator: Where draws come from.
    """

    def problems(self) -> list[str]:
        """Return a trained bias, which the variants do not know."""
        biased = f"method.name={self.name} is not defined for adapter.lora_bias=true; leave it out"
        return [*super().problems(), *([biased] if self.adapter.lora_bias else [])]

    def build(self, base: nn.Module, calibrate: Run, train_step: Run) -> nn.Module:
        """Return the base with LoRA adapters that run `update`."""
        model = super().build(base, calibrate, train_step)
        self.layers = AdapterSet(base, ADAPTER).layers
        self.generator = torch.Generator().manual_seed(self.adapter.seed)
        self.draws = 0
        for layer in self.layers.values():
            layer.lora_variant[ADAPTER] = self
        # On the innermost module: generate() and a missing task type bypass every level above it.
        base.register_forward_pre_hook(self._before_forward)
        return model

    def draw(self) -> None:
        """Draw anew, from `generator`."""
        raise NotImplementedError

    def update(self, layer: Any, x: Tensor) -> Tensor:
        """Return what a layer adds to the base layer's output for `x` (..., d_in), after `lora_dropout`."""
        raise NotImplementedError

    def update_weight(self, layer: Any) -> Tensor:
        """Return the update that merging adds to a layer's weight, in the weight's layout."""
        return layer.get_delta_weight(ADAPTER)

    def extra_state(self) -> dict[str, Any]:
        """Return the state of the generator."""
        return {"generator": self.generator.get_state(), "draws": self.draws}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Restore the generator."""
        self.generator.set_state(state["generator"])
        self.draws = int(state["draws"])

    def _before_forward(self, module: nn.Module, args: tuple) -> None:
        if module.training:
            self.draw()
            self.draws += 1

    # What PEFT's layers call in the place of their own forward and merging.

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Return the base layer's `result` with the update added."""
        return result + self.update(module, module.lora_dropout[active_adapter](x))

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        """Return the weight with the update added."""
        return orig_weight + self.update_weight(module).to(orig_weight.dtype)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:  # type: ignore[override]
        """Add the update to the weight in place."""
        orig_weight.data += self.update_weight(module).to(orig_weight.dtype)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        """Return the weight with the update taken off."""
        return orig_weight - self.update_weight(module).to(orig_weight.dtype)


@register("lora_dropout")
class LoraDropout(RandomLora):
    r"""Masks on columns of A and rows of B, averaged over several per step (arXiv 2404.09610).

    The update is :math:`diag(m_B)\,B A\,diag(m_A)` with one mask (d_in,) and one (d_out,) per layer, 0 with probability
    ``method.dropout`` and else 1 / (1 - p), shared by all tokens; the rank is never masked. (The paper does not
    rescale; its form is this one with ``lora_alpha`` times (1 - p)^2.) Out of training there are no masks: the forward,
    the merged weights and the saved folder are the expectation of the masked update.
    """

    own_options = ("dropout", "samples")
    masks: dict[nn.Module, tuple[Tensor, Tensor]]

    def backward(self, closure: Callable[[], Tensor], backward: Callable[[Tensor], Any]) -> Tensor:
        """Run the mean loss over ``method.samples`` mask sets and its backward pass, one set at a time."""
        total, samples = [], self.options.samples
        for _ in range(samples):
            part = closure() / samples
            backward(part)
            total.append(part.detach())
        return torch.stack(total).sum()

    def draw(self) -> None:
        """Draw the masks (d_in,), (d_out,) of every layer: 0, or 1 / (1 - p)."""
        sizes = [size for layer in self.layers.values() for size in (layer.in_features, layer.out_features)]
        keep = torch.rand(sum(sizes), generator=self.generator) >= self.options.dropout
        first = next(iter(self.layers.values()))
        masks = (keep.float() / (1 - self.options.dropout)).to(first.lora_A[ADAPTER].weight.device)  # one transfer
        pieces = iter(masks.split(sizes))
        self.masks = {layer: (next(pieces), next(pieces)) for layer in self.layers.values()}

    def update(self, layer: Any, x: Tensor) -> Tensor:
        """Return the (masked) update of a layer for `x` (..., d_in)."""
        down, up, scaling = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER], layer.scaling[ADAPTER]
        if not layer.training:
            return up(down(x)) * scaling
        keep_in, keep_out = self.masks[layer]
        y = up(down(x * keep_in.to(x)))
        return y * (scaling * keep_out).to(y)


@register("dylora")
class DyLora(RandomLora):
    r"""A random prefix of the directions per step, so that every smaller rank works too (arXiv 2210.07558).

    Every training forward draws b uniformly from 1 to r, the same for all layers, and runs on
    :math:`(\alpha / b)\,B_{:, :b} A_{:b}` (with rank-stabilised scaling, :math:`\alpha / \sqrt b`). Out of training the
    model runs, merges and exports at `rank`.

    Attributes:
        rank: Rank b out of training, in [1, r]; r at the start.
        drawn: Rank of the last training forward.
    """

    slices = False

    def problems(self) -> list[str]:
        """Return settings with which there is no one order of directions."""
        found, adapter = super().problems(), self.adapter
        if adapter.r < 2 or adapter.rank_pattern:
            found.append("method.name=dylora needs one rank >= 2 for all layers; set adapter.r, no rank_pattern")
        if adapter.init_lora_weights in ("shared", "gradient"):
            start = adapter.init_lora_weights
            found.append(f"method.name=dylora cannot start from init_lora_weights={start}; leave it out")
        self.rank = self.drawn = adapter.r
        return found

    def export(self, folder: Path) -> dict[str, float]:
        """Write the plain LoRA folder of `rank`, with ``lora_alpha`` unchanged."""
        state = get_peft_model_state_dict(self.model)
        for key, value in state.items():
            if key.endswith("lora_A.weight"):
                state[key] = value[: self.rank]
            elif key.endswith("lora_B.weight"):
                state[key] = value[:, : self.rank]
        config = self.model.peft_config[ADAPTER]
        write_lora(folder, config, state, self.rank, config.lora_alpha)
        return {"rank": float(self.rank)}

    def draw(self) -> None:
        """Draw the rank of a training forward."""
        self.drawn = int(torch.randint(1, self.adapter.r + 1, (), generator=self.generator))

    def update(self, layer: Any, x: Tensor) -> Tensor:
        """Return the update of a layer for `x` (..., d_in)."""
        A, B, scaling = self._prefix(layer, self.drawn if layer.training else self.rank)
        return F.linear(F.linear(x, A), B) * scaling

    @torch.no_grad()
    def update_weight(self, layer: Any) -> Tensor:
        """Return the update at `rank` in the layout of the layer's weight."""
        A, B, scaling = self._prefix(layer, self.rank)
        delta = scaling * (B @ A)
        return delta.T if isinstance(layer.get_base_layer(), Conv1D) else delta

    def _prefix(self, layer: Any, b: int) -> tuple[Tensor, Tensor, float]:
        """Return A (b, d_in) and B (d_out, b) of the first b directions, and the scaling of a LoRA of rank b."""
        ratio = self.adapter.r / b
        scaling = layer.scaling[ADAPTER] * (ratio**0.5 if layer.use_rslora[ADAPTER] else ratio)
        return layer.lora_A[ADAPTER].weight[:b], layer.lora_B[ADAPTER].weight[:, :b], scaling


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
            raise ConfigError(f"method.name={self.name} has nothing to compare: {why}; roles: {roles}")
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
