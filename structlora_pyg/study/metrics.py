"""Metrics of predictions, as the field reports them; scikit-learn's and SciPy's where they have them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def joined(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return outputs and labels of all batches.

    Raises:
        FloatingPointError: If an output is not finite.
    """
    outputs, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    if not outputs.isfinite().all():
        raise FloatingPointError("the model's output in evaluation is not finite")
    return outputs, labels


def class_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the cross-entropy ``loss`` and the ``accuracy`` of logits (N, classes) for labels (N,)."""
    accuracy = (logits.argmax(-1) == labels).double().mean().item()
    return {"loss": F.cross_entropy(logits, labels).item(), "accuracy": accuracy}


def top5(logits: Tensor, labels: Tensor) -> float:
    """Return how often the label is among the five largest logits (N, classes)."""
    return (logits.topk(5).indices == labels.unsqueeze(-1)).any(-1).double().mean().item()


def class_score(metric: str, predicted: Tensor, labels: Tensor) -> float:
    """Return ``f1`` of class 1, or ``matthews``, of predicted classes (N,)."""
    from sklearn.metrics import f1_score, matthews_corrcoef

    if metric == "f1":
        return float(f1_score(labels, predicted, zero_division=0.0))
    return float(matthews_corrcoef(labels, predicted))


def correlations(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Return both correlations; 0 where predictions or labels are constant, which leaves them undefined."""
    from scipy.stats import pearsonr, spearmanr

    if len(scores.unique()) == 1 or len(labels.unique()) == 1:
        return {"pearson": 0.0, "spearman": 0.0}
    x, y = scores.double().numpy(), labels.double().numpy()
    return {"pearson": float(pearsonr(x, y).statistic), "spearman": float(spearmanr(x, y).statistic)}
