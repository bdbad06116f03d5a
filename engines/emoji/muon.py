"""Muon: an optimizer that learns these networks in a fraction of AdamW's steps.

Ref: Jordan 2024, https://kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv:2502.16982, for the size of a step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def optimizers_for(network: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the networks; AdamW for embeddings, gains, biases, the first and the last layer."""
    outside = ("embedding", "conv_in", "conv_out", "quant_conv")
    matrices, others = [], []
    for name, weight in network.named_parameters():
        if weight.requires_grad:
            inside = weight.ndim >= 2 and not any(part in name for part in outside)
            (matrices if inside else others).append(weight)
    return [Muon(matrices, rate), torch.optim.AdamW(others, rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)]


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every direction of a weight matrix moves as much as any other.

    Kernels count as matrices, output channels by all the rest; an update has the size of AdamW's, so that both take
    the same learning rate.
    """

    def __init__(self, weights: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(weights, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_side: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}
            for w in group["params"]:
                momentum = self.state[w].setdefault("momentum", torch.zeros_like(w))
                momentum.lerp_(w.grad, 1 - group["momentum"])
                update = w.grad.lerp(momentum, group["momentum"]).flatten(1)
                by_side.setdefault(min(update.shape), []).append((w, update))
            for weights, updates in (zip(*pairs, strict=True) for pairs in by_side.values()):
                for w, update in zip(weights, orthogonal(updates), strict=True):
                    w.mul_(1 - group["lr"] * group["weight_decay"])
                    w.add_(update.view_as(w), alpha=-group["lr"] * 0.2 * max(update.shape) ** 0.5)


def orthogonal(matrices: Sequence[Tensor]) -> list[Tensor]:
    """The nearest orthogonal matrices, nearly: five Newton-Schulz steps bring every singular value close to one.

    They share their shorter side, so the steps act on one stack of small squares, the inner products of their rows.
    """
    wide = [m if m.shape[0] <= m.shape[1] else m.T for m in matrices]
    norms = torch.stack([m.norm() + 1e-7 for m in wide])[:, None, None]
    gram = torch.stack([m @ m.T for m in wide]) / norms**2
    one = torch.eye(len(gram[0]), device=gram.device)
    total = one.expand_as(gram)
    for _ in range(5):
        step = 3.4445 * one + torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        total, gram = step @ total, step @ gram @ step
    made = [t @ m for t, m in zip(total / norms, wide, strict=True)]
    return [x if m is w else x.T for x, m, w in zip(made, matrices, wide, strict=True)]
