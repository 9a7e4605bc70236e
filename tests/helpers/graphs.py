"""Adapter graphs from random numbers."""

import torch
from torch_geometric.data import Data

from structlora_pyg import build_edges
from structlora_pyg.data.encoding import update_code


def graph(n: int = 6, d: int = 3, p: int = 4, seed: int = 0) -> Data:
    g = torch.Generator().manual_seed(seed)
    code_A, code_B = (torch.randn(n, d, p, generator=g) for _ in range(2))
    scaling = torch.full((n, d), 2.0)
    role, depth = torch.arange(n) % 2, torch.arange(n) // 2
    edge_index, edge_weight = build_edges("hybrid", depth, role, depth, torch.rand(n, n, generator=g))
    x = update_code(code_A, code_B, scaling)
    data = Data(x=x, edge_index=edge_index, edge_weight=edge_weight, code_A=code_A, code_B=code_B, scaling=scaling)
    return data
