r"""The auxiliary loss: what the filter pays for information about the input, and earns for information on the label.

.. math:: \mathcal{L} = \mathcal{L}_{task} + \mathrm{ramp}\,(\beta\,I(\Delta\tilde W; X) - \gamma\,I(\Delta\tilde W; Y))

(StructLoRA, arXiv 2603.14228; both terms by variational bounds, which the paper does not spell out.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structlora_pyg.data.adapters import AdapterSet
from structlora_pyg.data.graph_builder import GraphBuilder


class Information(nn.Module):
    r"""Bounds on both terms from the gates and the rank codes :math:`t = A x`, pooled over tokens.

    Args:
        num_directions: Total number K of directions over all adapters.
        beta: Weight of the compression term.
        compression: ``gate``: mean KL of the gates to their prior, which the filter computes. ``vib``:
            :math:`\tfrac12 \mathrm{mean}\,(m_j t_j)^2`, the KL of unit-noise codes :math:`\mathcal{N}(m t, 1)` to
            :math:`\mathcal{N}(0, 1)` (arXiv 1612.00410), with t divided by its running root mean square.
        gamma: Weight of the label term.
        label_term: ``none``; ``decoder``: cross-entropy (or squared error if `num_labels` is 1) of a linear head on
            the noisy gated codes (Barber-Agakov bound); ``infonce`` (arXiv 1807.03748); ``task``: the network itself
            is the decoder, so that the term only weights the task loss by 1 + gamma.
        num_labels: Number of classes; 1 for real-valued labels.
    """

    mean_square: Tensor
    key: nn.Module

    def __init__(
        self,
        num_directions: int,
        beta: float = 0.01,
        compression: str = "gate",
        gamma: float = 0.0,
        label_term: str = "none",
        num_labels: int | None = None,
    ) -> None:
        super().__init__()
        self.beta, self.compression, self.gamma, self.label_term = beta, compression, gamma, label_term
        self.num_labels = num_labels
        self.register_buffer("mean_square", torch.zeros(num_directions))
        if label_term == "decoder":
            self.head = nn.Linear(num_directions, num_labels or 1)
        elif label_term == "infonce":
            classes = num_labels or 1
            self.key = nn.Linear(1, num_directions) if classes == 1 else nn.Embedding(classes, num_directions)

    @property
    def needs_codes(self) -> bool:
        """Whether the rank codes of a forward pass have to be collected."""
        return self.label_term in ("decoder", "infonce") or self.compression == "vib"

    def forward(self, kl: Tensor, gate: Tensor, codes: Tensor | None, labels: Tensor | None) -> Tensor:
        """Return the auxiliary loss, a scalar, before the ramp.

        Args:
            kl: Mean divergence of the gates, a scalar.
            gate: (K,) gates of all directions.
            codes: (batch, K) pooled rank codes, or None where they are not needed.
            labels: (batch,) labels, or None: the label term is left out.
        """
        if codes is None:
            return self.beta * kl
        white = self._whiten(codes) * gate
        loss = self.beta * (0.5 * white.square().mean() if self.compression == "vib" else kl)
        if labels is not None and self.label_term in ("decoder", "infonce"):
            loss = loss + self.gamma * self._label_term(white + torch.randn_like(white), labels)
        return loss

    def _whiten(self, codes: Tensor) -> Tensor:
        with torch.no_grad():
            now = self._mean_square(codes.float())
            if self.training:
                self.mean_square.copy_(torch.where(self.mean_square > 0, self.mean_square.lerp(now, 0.01), now))
        scale = torch.where(self.mean_square > 0, self.mean_square, now)
        return codes.float() / scale.add(1e-12).sqrt()

    def _mean_square(self, codes: Tensor) -> Tensor:
        """Return the mean square over the batch, in training over those of all processes."""
        total = torch.cat([codes.square().sum(0), codes.new_tensor([len(codes)])])
        if self.training and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        return total[:-1] / total[-1]

    def _label_term(self, codes: Tensor, labels: Tensor) -> Tensor:
        if labels.shape != codes.shape[:1]:
            raise ValueError(
                f"label_term={self.label_term!r} needs one label per example, got labels of shape "
                f"{tuple(labels.shape)}; for language models use label_term=task or none"
            )
        real = self.num_labels == 1
        if self.label_term == "decoder":
            prediction = self.head(codes)
            return F.mse_loss(prediction.squeeze(-1), labels.float()) if real else F.cross_entropy(prediction, labels)
        keys = self.key(labels.float().unsqueeze(-1) if real else labels)
        scores = F.normalize(codes, dim=-1) @ F.normalize(keys, dim=-1).T / 0.1
        return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


class RankCodes:
    """Collects the rank codes of every adapted layer, averaged over the tokens of an example that are not padding.

    Args:
        mask: (batch, tokens) attention mask of the forward, where it has one.
    """

    def __init__(self, mask: Tensor | None = None) -> None:
        self._mask = mask
        self._codes: dict[int, Tensor] = {}

    def add(self, position: int, t: Tensor) -> None:
        """Add the codes `t` (batch, ..., r) of the layer at `position` in the adapter set."""
        if t.dim() > 2:
            tokens = t.flatten(1, -2)
            if isinstance(self._mask, Tensor) and self._mask.shape == tokens.shape[:2]:
                weight = self._mask.to(tokens).unsqueeze(-1)
                t = (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)
            else:
                t = tokens.mean(1)
        self._codes[position] = t

    def pooled(self, adapters: AdapterSet, graph: GraphBuilder) -> Tensor:
        """Return the codes (batch, K) in the order of the graph's directions.

        Raises:
            RuntimeError: If a layer has not run, or ran on inputs of another batch.
        """
        positions = {path: i for i, path in enumerate(adapters.layers)}
        try:
            pieces = [self._codes[positions[a.layer]][:, a.ranks].to(graph.scaling.device) for a in adapters]
            order = [i for _, i in sorted((graph.first_row[i], i) for i in range(len(adapters)))]
            return torch.cat([pieces[i] for i in order], dim=1)
        except (KeyError, RuntimeError) as error:
            raise RuntimeError(
                "rank codes could not be collected: every adapted layer has to run once per forward, on inputs whose "
                "first dimension is the batch. Use compression=gate and label_term=none for this model"
            ) from error
