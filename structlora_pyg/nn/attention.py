"""What convolutions tell while they run: their attention weights to us, and nothing to explainers of the base."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

from structlora_pyg.nn.hetero_conv import RelationalConv

Attention = tuple[Tensor, Tensor]


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


@contextmanager
def unexplained(module: nn.Module) -> Iterator[None]:
    """Keep PyG's explainers out of the forwards of `module` inside the ``with`` block.

    They put masks and hooks into every `MessagePassing` layer of a model, those of the coordinator included, and mean
    the layers of the network.
    """
    layers = (part for part in module.modules() if isinstance(part, MessagePassing))
    kept = [(part, part.explain, part._message_forward_hooks) for part in layers]
    kept = [(part, explain, hooks) for part, explain, hooks in kept if explain or hooks]
    for part, _, _ in kept:
        part.explain, part._message_forward_hooks = False, OrderedDict()
    try:
        yield
    finally:
        for part, explain, hooks in kept:
            part.explain, part._message_forward_hooks = explain, hooks
