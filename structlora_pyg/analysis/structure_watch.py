"""The structure of updates and of their gradients while a model trains."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F

from structlora_pyg.analysis.smoothing import coordinator_energies
from structlora_pyg.analysis.structure import adapter_structure, adjacent_pairs
from structlora_pyg.data.adapters import AdapterSet
from structlora_pyg.data.encoding import Encoding
from structlora_pyg.tuner.gradients import GradientSketch
from structlora_pyg.tuner.model import StructLoraModel


class StructureWatch:
    """Measures a LoRA model, coordinated or plain, around chosen training steps.

    `open` before the forward passes of a step, `read` after its optimizer step. Gradients are those of the adapted
    weights, sketched by the same random projections for every method, so that their cosines can be compared.

    Args:
        model: A `peft.PeftModel` with LoRA adapters, or a `StructLoraModel`.

    Raises:
        ValueError: If the model has no LoRA on linear layers.
    """

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        if isinstance(model, StructLoraModel):
            self.adapters = model.graph_pass.adapters
        else:
            self.adapters = AdapterSet(model.get_base_model(), "default")
        encoding = Encoding([a.in_features for a in self.adapters], [a.out_features for a in self.adapters])
        self._gradients = GradientSketch(self.adapters, encoding, ema=0.0).to(next(model.parameters()).device)

    def open(self) -> None:
        """Collect the gradients of the forward and backward passes that follow."""
        self._gradients.open()

    def read(self) -> dict[str, Any]:
        """Return what the step showed.

        Returns:
            ``adjacent_cosine``, ``drift_energy``, ``relative_drift`` of the updates (see `structure`);
            ``gradient_cosine``, the mean cosine of the gradients over the same pairs; ``open_gates``, the share of
            gates that are not 0, and ``mean_gate``, both None without filter. None too for what is not defined: the
            cosine of updates that are still 0, or of a single layer. ``dirichlet``: the relative Dirichlet energy of
            the coordinator's features, a list of one number a layer from its input on, see
            `structlora_pyg.analysis.smoothing`; None without a coordinator.
        """
        self._gradients.close()
        found = adapter_structure(self.model)
        values: dict[str, Any] = {
            "adjacent_cosine": _defined(found.adjacent_cosine),
            "drift_energy": _defined(found.drift_energy),
            "relative_drift": _defined(found.relative_drift),
            "gradient_cosine": self._gradient_cosine(),
            "dirichlet": coordinator_energies(self.model) if isinstance(self.model, StructLoraModel) else None,
        }
        return {**values, **gate_summary(self.model)}

    def _gradient_cosine(self) -> float | None:
        pairs = adjacent_pairs(self.adapters)
        if not self._gradients.finish() or not pairs:
            return None
        unit = F.normalize(self._gradients.average, dim=1)
        return sum(float(unit[i] @ unit[j]) for i, j in pairs) / len(pairs)


@torch.no_grad()
def gate_summary(model: nn.Module) -> dict[str, float | None]:
    """Return ``open_gates`` and ``mean_gate`` over the real directions, in [0, 1]; None without a filter that acts."""
    if not isinstance(model, StructLoraModel):
        return {"open_gates": None, "mean_gate": None}
    graph = model.adapter_graph()
    gate = graph.gate[graph.scaling != 0]
    return {"open_gates": float((gate != 0).float().mean()), "mean_gate": float(gate.mean())}


def _defined(value: float) -> float | None:
    return value if value == value else None
