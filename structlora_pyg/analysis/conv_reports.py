"""What the library makes of every convolution of PyTorch Geometric, found by trying each."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from structlora_pyg.nn.conv import CONVOLUTIONS, MODELS, edge_information, example_graph, make_conv, try_conv
from structlora_pyg.nn.hetero_conv import RelationalConv

METADATA = (["q", "v"], [("q", "same_role", "q"), ("q", "same_block", "v"), ("v", "same_block", "q")])


@dataclass(frozen=True, kw_only=True)
class ConvReport:
    """What the library makes of a convolution.

    Attributes:
        name: Class name in `torch_geometric.nn`.
        works: Whether it can coordinate.
        edge_information: What it uses of an adapter graph that carries everything.
        hetero: The value of ``coordinator.hetero`` that runs it as relations between roles; empty if there is none.
        reason: Why it is refused without ``coordinator.hetero``; empty if it works.
    """

    name: str
    works: bool
    edge_information: tuple[str, ...]
    hetero: str
    reason: str


def conv_reports(channels: int = 16) -> list[ConvReport]:
    """Return a report on every convolution and ready stack of `torch_geometric.nn`, by trying it."""
    found = []
    for name in (*CONVOLUTIONS, *MODELS):
        example = example_graph(channels, relations=4)
        example.role = torch.tensor([0, 1, 0, 1])
        used: tuple[str, ...] = ()
        reason = ""
        try:
            conv = make_conv(name, channels, {}, example)
            try_conv(conv, channels, example)
            used = edge_information(conv, example)
        except ValueError as error:
            reason = str(error)
        found.append(
            ConvReport(
                name=name, works=not reason, edge_information=used, hetero=_hetero(name, channels), reason=reason
            )
        )
    return found


def _hetero(name: str, channels: int) -> str:
    kind = "to_hetero" if name in MODELS else "hetero_conv"
    try:
        RelationalConv(name, channels, METADATA, kind, {}, example_graph(channels))
    except ValueError:
        return ""
    return kind
