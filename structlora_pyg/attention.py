"""What the coordinator attends to: the attention weights of its convolutions."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from structlora_pyg.model import StructLoraModel
from structlora_pyg.relational import RelationalConv

Attention = tuple[Tensor, Tensor]


def attention(model: StructLoraModel) -> list[Attention]:
    """Return the attention weights of the coordinator on the current adapter graph, layer by layer.

    Args:
        model: A model whose coordinator has convolutions that take ``return_attention_weights``: ``GATConv``,
            ``GATv2Conv``, ``TransformerConv``, ``RGATConv``, and the stack ``GAT``.

    Returns:
        ``(edge_index (2, E'), alpha (E', heads))`` a layer, detached, in eval mode. The edges are those that the
        convolution really used, with the loops it added (``GATConv`` and ``GATv2Conv`` do): over the edges into a
        node, the weights of a head add up to 1.

    Raises:
        ValueError: If the coordinator has no such convolution.
    """
    with watched_attention(model.coordination) as found:
        model.adapter_graph()
    if not found:
        config = model.structlora_config.coordinator
        raise ValueError(
            f"coordinator.conv={config.conv} with coordinator.hetero={config.hetero} has no attention weights over the "
            "graph's edges; choose GATv2Conv or TransformerConv, with hetero=none"
        )
    return found


@contextmanager
def watched_attention(module: nn.Module) -> Iterator[list[Attention]]:
    """Collect the attention weights of the forwards of `module` inside the ``with`` block, in order."""
    found: list[Attention] = []

    def after(conv: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        _, (edge_index, alpha) = conv.forward(*args, **kwargs, return_attention_weights=True)
        found.append((edge_index.detach(), alpha.detach().flatten(1) if alpha.dim() > 1 else alpha.detach()[:, None]))

    # The convolution of a relation numbers the nodes of its two types by itself: its edges are none of the graph's.
    relations = {part for typed in module.modules() if isinstance(typed, RelationalConv) for part in typed.modules()}
    hooks = [
        part.register_forward_hook(after, with_kwargs=True)
        for part in module.modules()
        if part not in relations and "return_attention_weights" in inspect.signature(part.forward).parameters
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
