r"""Teaching the noise levels by held-out loss: a one-step hypergradient from first-order passes.

A step of the optimizer is :math:`\theta - \eta D g(\alpha)`, with g the gradient of the training loss under noise of
the levels :math:`\alpha` and D Adam's preconditioner. With v the gradient of the held-out loss without noise, the
levels that make the step better ascend :math:`\langle g(\alpha), D v \rangle`. Its derivative is the change of
:math:`\partial L / \partial \alpha` along :math:`u = D v`, and two passes with the same noise give it:

.. math:: \frac{\partial_\alpha L(\theta + \delta u) - \partial_\alpha L(\theta - \delta u)}{2 \delta}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from structlora_pyg.tuner.hooks import PassHooks

Loss = Callable[[], Tensor]
SHIFT = 1e-3  # root mean square of the change of the parameters in the two passes


def teach(model: Any, train_loss: Loss, held_out_loss: Loss, rate: float = 0.5) -> None:
    """Teach the noise levels by held-out loss, between two optimizer steps; about as dear as three of them.

    Parameters that the optimizer holds, their gradients and torch's random numbers are as before. Nothing is taught
    before the optimizer's first step.

    Args:
        model: The `StructLoraModel`, whose method this is.
        train_loss: Runs the model on a training batch and returns the loss; called twice, in training mode.
        held_out_loss: The same for examples that are not trained on; called once, in evaluation mode.
        rate: Step of the common level on the scale of its logit, > 0; 0.05 times the optimizer steps between two
            lessons serves trainings of a hundred to a thousand steps.

    Raises:
        ValueError: If there is no noise, or ``coordinator.levels`` is ``fixed``.
    """
    hooks, levels = model.hooks, model.graph_pass.levels
    if levels is None:
        raise ValueError("there are no noise levels to teach: set filter.noise, and not coordinator.levels=fixed")
    parameters = [p for p in model.parameters() if p.requires_grad]
    scales = hooks.updated.preconditioner(parameters)
    if scales is None:
        return  # no optimizer step yet
    kept, was = [p.detach().clone() for p in parameters], model.training
    devices = sorted({p.device.index for p in parameters if p.device.type == "cuda"})
    own, graph_pass, found = list(levels.parameters()), hooks.graph_pass, []
    with undisturbed(hooks), torch.random.fork_rng(devices), torch.enable_grad():
        try:
            model.eval()
            held_out = torch.autograd.grad(held_out_loss(), parameters, allow_unused=True)
            model.train()
            pairs = zip(held_out, scales, strict=True)
            along = [torch.zeros_like(p) if v is None else v * d for p, (v, d) in zip(parameters, pairs, strict=True)]
            squares = torch.stack([u.float().square().sum() for u in along]).sum()
            size = squares.div(sum(u.numel() for u in along)).sqrt().clamp(min=1e-30)
            levels.requires_grad_()
            data, _ = graph_pass()
            levels.held = data.level.detach().requires_grad_()
            state = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]
            for sign in (1.0, -1.0):
                with torch.no_grad():
                    for p, old, u in zip(parameters, kept, along, strict=True):
                        p.copy_(torch.add(old, u * (sign * SHIFT / size)))
                torch.set_rng_state(state[0])
                for d, s in zip(devices, state[1:], strict=True):
                    torch.cuda.set_rng_state(s, d)
                found.append(torch.autograd.grad(train_loss(), [levels.held, *parameters], allow_unused=True))
            ascent = (found[0][0] - found[1][0]) / (2 * SHIFT)
            agreement = _agreement(hooks, parameters, held_out, found).to(levels.agreement)
            if dist.is_available() and dist.is_initialized():  # the levels are those of all processes
                dist.all_reduce(ascent)
                dist.all_reduce(agreement)
                agreement /= dist.get_world_size()
            gradient = torch.autograd.grad(data.level, own, -ascent, allow_unused=True)
        finally:
            levels.held = None
            levels.requires_grad_(False)
            with torch.no_grad():
                for p, old in zip(parameters, kept, strict=True):
                    p.copy_(old)
            model.train(was)
        levels.agreement.copy_(agreement)
        levels.step([torch.zeros_like(p) if g is None else g for p, g in zip(own, gradient, strict=True)], rate)
        levels.decide(data)


@contextmanager
def undisturbed(hooks: PassHooks) -> Iterator[None]:
    """Let forwards happen that are no part of training."""
    hooks.count_steps()
    data, losses, hooks.teaching = hooks.data, hooks.losses, True
    try:
        yield
    finally:
        hooks.teaching = False
        hooks.forget()
        hooks.data, hooks.losses = data, losses


def _agreement(hooks: PassHooks, parameters: list[nn.Parameter], held_out: tuple, found: list[tuple]) -> Tensor:
    """Return the cosine of the gradients of held-out and training loss per node (N,)."""
    adapters, graph = hooks.graph_pass.adapters, hooks.graph_pass.graph
    place = {id(p): k for k, p in enumerate(parameters)}
    cosine = torch.zeros(graph.num_nodes)
    counted = torch.zeros(graph.num_nodes)
    for i, (node, _) in enumerate(graph.places):
        _, up = adapters.sides(adapters[i].layer)
        k = place.get(id(up.raw))
        if k is None or held_out[k] is None or found[0][k + 1] is None:
            continue
        training = (found[0][k + 1] + found[1][k + 1]).flatten()
        cosine[node] += float(F.cosine_similarity(held_out[k].flatten(), training, dim=0))
        counted[node] += 1
    return cosine / counted.clamp(min=1)
