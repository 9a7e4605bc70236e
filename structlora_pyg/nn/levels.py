r"""Noise levels: how much of its input each adapter may hear, decided over the adapter graph by held-out loss.

The filter multiplies the rank code :math:`t_j = a_j^\top x` of every token by :math:`1 + \alpha_j \epsilon` with
:math:`\epsilon \sim \mathcal{N}(0, 1)`. Less than no noise is never better for the training loss, so that it cannot
teach the levels :math:`\alpha`; the loss on examples held out of training can.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.data import Data

from structlora_pyg.nn.coordinator import Coordinator

AGREEMENT = "agreement"


class Levels(nn.Module):
    r"""Writes the noise levels of the adapter graph, a ``Data -> Data`` module.

    .. math:: \alpha = \alpha_{max}\,\sigma(\mathrm{logit}(\alpha_0 / \alpha_{max}) + c + f_i)

    with :math:`\alpha_0` the filter's ``level``, c learned for all nodes together, and :math:`f_i` of node i from
    `network` (message passing over the graph; less the mean of all), a free number, or 0. All start at 0, so that
    training begins with the filter's levels. Nothing here has a gradient from the training loss, and no optimizer of
    the caller holds it. What a lesson has decided, ``decided`` (N, 1), holds until the next one.

    Args:
        nodes: Number of nodes N.
        roles: Number of roles.
        network: Reads the features of the nodes, `features` of them; its message is not used, but the hidden states.
        free: Give every node a number of its own in the place of a network.
        most: :math:`\alpha_{max}` > 0.
        hidden_channels: Width of the network's states.
    """

    slower = 0.01  # what nodes tell each other is learned more slowly than what they have in common
    agreement: Tensor
    decided: Tensor
    moments: Tensor
    taught: Tensor

    def __init__(
        self,
        nodes: int,
        roles: int,
        network: Coordinator | None = None,
        free: bool = False,
        most: float = 2.5,
        hidden_channels: int = 16,
    ) -> None:
        super().__init__()
        self.roles, self.most, self.network = roles, most, network
        self.common = nn.Parameter(torch.zeros(1))
        self.own = nn.Parameter(torch.zeros(nodes, 1)) if free else None
        self.head = None if network is None else nn.Linear(hidden_channels, 1)
        if self.head is not None:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        self.learned = {n for n, p in self.named_parameters() if p.requires_grad}  # not those of a frozen network
        self.requires_grad_(False)
        self.held: Tensor | None = None  # (N, D) levels in the place of one's own, while they are taught
        self.register_buffer(AGREEMENT, torch.zeros(nodes))
        self.register_buffer("decided", torch.zeros(nodes, 1))
        self.register_buffer("moments", torch.zeros(2, sum(p.numel() for p in self.parameters())))
        self.register_buffer("taught", torch.zeros((), dtype=torch.long))

    @staticmethod
    def num_features(roles: int) -> int:
        """Return the number of features of a node."""
        return 4 + roles

    def features(self, data: Data) -> Tensor:
        """Return what the network reads of each node (N, `num_features`).

        Mean gate, logarithm of the size of the update relative to the others, depth in [0, 1], agreement of the
        gradients of training and held-out loss in [-1, 1], and role (one of R).
        """
        size = data.x.norm(dim=-1)
        exists = (data.scaling != 0).sum(-1).clamp(min=1)
        columns = [
            data.gate.sum(-1) / exists,
            (size / size.mean().clamp(min=1e-12)).clamp(min=0.05).log(),
            data.depth.to(size) / data.depth.max().clamp(min=1),
            self.agreement,
        ]
        roles = F.one_hot(data.role.clamp(min=0), self.roles) * (data.role >= 0).unsqueeze(-1)
        return torch.cat([torch.stack([c.to(size.dtype) for c in columns], dim=-1), roles.to(size.dtype)], dim=-1)

    def seen(self, data: Data) -> Data:
        """Return a filtered graph as the network is given it."""
        out = copy.copy(data)
        out.x = self.features(data)
        return out

    def forward(self, data: Data) -> Data:
        """Return a shallow copy of `data` with ``level`` (N, D) in [0, most)."""
        out = copy.copy(data)
        out.level = self.levels(data) if self.held is None else self.held
        return out

    def levels(self, data: Data) -> Tensor:
        """Return the levels (N, D) of a filtered graph: in training those decided, else those of the parameters."""
        lesson = self.common.requires_grad
        shift = self.decided if self.training and not lesson else self.shift(data)
        start = (data.level / self.most).clamp(1e-6, 1 - 1e-6)
        return self.most * torch.sigmoid(torch.logit(start) + shift) * (data.level > 0)

    @torch.no_grad()
    def decide(self, data: Data) -> None:
        """Take the levels of a filtered graph from the parameters, until this is called again."""
        self.decided.copy_(self.shift(data))

    def shift(self, data: Data) -> Tensor:
        """Return what the parameters add to the levels of a filtered graph, on the scale of the logit (N, 1)."""
        shift = self.common.expand(data.num_nodes, 1)
        if self.own is not None:
            shift = shift + self.own
        if self.network is not None and self.head is not None:
            told = self.head(self.network.states(self.seen(data))[-1])
            shift = shift + told - told.mean()  # how they differ; what they have in common is learned faster
        return shift

    @torch.no_grad()
    def step(self, gradient: list[Tensor], rate: float) -> None:
        """Move the parameters against a gradient, by Adam with both decays 0.9.

        Args:
            gradient: Of the held-out loss, one for each of `parameters`.
            rate: Step of the common level on the scale of the logit, > 0; nodes and network take `slower` of it.
        """
        g = torch.cat([part.flatten() for part in gradient])
        speeds = {n: 1.0 if n == "common" else self.slower for n in self.learned}
        own = torch.cat([torch.full_like(p, speeds.get(n, 0.0)).flatten() for n, p in self.named_parameters()])
        self.taught += 1
        self.moments[0].lerp_(g, 0.1)
        self.moments[1].lerp_(g.square(), 0.1)
        unbiased = self.moments / (1 - 0.9 ** float(self.taught))
        change = rate * own * unbiased[0] / (unbiased[1].sqrt() + 1e-12)
        for p, part in zip(self.parameters(), change.split([p.numel() for p in self.parameters()]), strict=True):
            p.sub_(part.view_as(p))
