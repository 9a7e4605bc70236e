"""What the coordinator attends to: the attention weights of its convolutions."""

from __future__ import annotations

from structlora_pyg.nn.attention import Attention, watched_attention
from structlora_pyg.tuner.model import StructLoraModel


def attention(model: StructLoraModel) -> list[Attention]:
    """Return the attention weights of the coordinator on the current adapter graph, layer by layer.

    Args:
        model: A model whose coordinator has convolutions that take ``return_attention_weights``: ``GATConv``,
            ``GATv2Conv``, ``TransformerConv``, ``RGATConv``, and the stack ``GAT``.

    Returns:
        ``(edge_index (2, E'), alpha (E', heads))`` per layer, detached, in eval mode. The edges are those that the
        convolution really used, with the loops it added (``GATConv`` and ``GATv2Conv`` do): over the edges into a
        node, the weights of a head add up to 1.

    Raises:
        ValueError: If the coordinator has no such convolution.
    """
    with watched_attention(model.graph_pass) as found:
        model.adapter_graph()
    if not found:
        config = model.structlora_config.coordinator
        raise ValueError(
            f"coordinator.conv={config.conv} with coordinator.hetero={config.hetero} has no attention weights over the "
            "graph's edges; choose GATv2Conv or TransformerConv, with hetero=none"
        )
    return found
