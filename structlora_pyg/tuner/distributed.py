"""DeepSpeed ZeRO-3 cuts every parameter, also those that the graph pass reads all at once: here they are put together.

The frozen base stays cut, and a layer of it is gathered while it runs, as always under ZeRO-3.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn


def whole(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    """Return a context in which parameters that DeepSpeed has cut are whole; every process has to enter it."""
    cut: list[Any] = [p for p in parameters if is_cut(p)]
    if not cut:
        return nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters(cut)


def keep_whole(module: nn.Module, parameters: list[nn.Parameter]) -> None:
    """Make cut parameters whole until the forward pass of `module` is over, and again for its backward pass."""
    cut: list[Any] = [p for p in parameters if is_cut(p)]
    if not cut:
        return
    from deepspeed import zero

    for p in cut:
        zero.register_external_parameter(module, p)
    cut[0].all_gather(cut)


def is_cut(parameter: Any) -> bool:
    """Return whether other processes hold parts of a parameter, as DeepSpeed has left it."""
    return hasattr(parameter, "ds_id") and parameter.ds_status.name == "NOT_AVAILABLE"
