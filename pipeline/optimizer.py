"""The paper's SGD (section 5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd


@dataclass
class _Group:
    """Parameters that learn at `factor` times the rate, and their buffers."""

    weights: list[nn.Parameter]
    buffers: list[Tensor]
    factor: float
    decay: float


class SGD:
    """v = momentum * v - decay * rate * w - rate * gradient; w += v.

    The rate stands inside the velocity, unlike in `torch.optim.SGD`, whose kernels these steps are:
    there the buffer is -v / rate, so that it only has to be rescaled when the rate changes. Biases
    learn at `bias_rate` times the rate and decay only if `decay_bias` (source: 2 and not). Weights
    that need no gradient stay as they are.

    It is no `torch.optim.Optimizer`: to make one takes torch's compiler, more than a second of a
    core in each process that starts. Made once the weights are on their device.
    """

    def __init__(
        self,
        weights: dict[str, nn.Parameter],
        *,
        rate: float,
        momentum: float = 0.9,
        decay: float = 5e-4,
        bias_rate: float = 1.0,
        decay_bias: bool = True,
    ) -> None:
        def group(suffix: str, factor: float, decay: float) -> _Group:
            params = [p for n, p in weights.items() if n.endswith(suffix) and p.requires_grad]
            return _Group(params, [torch.zeros_like(p) for p in params], factor, decay)

        self._groups = [
            group(".weight", 1.0, decay),
            group(".bias", bias_rate, decay if decay_bias else 0.0),
        ]
        self.rate, self.momentum = rate, momentum
        self.before_change: Callable[[], None] = lambda: None
        """Called before weights or velocities change: a checkpoint may still be copying them."""

    @torch.no_grad()
    def step(self, valid: Tensor | None = None) -> None:
        """A step of the weights that have gradients, or none at all unless `valid`, bool [] on the
        weights' device, for which the host does not wait.
        """
        self.before_change()
        found_inf = None if valid is None else (~valid).float()
        for group in self._groups:
            have = [i for i, p in enumerate(group.weights) if p.grad is not None]
            sgd(
                [group.weights[i] for i in have],
                [group.weights[i].grad for i in have],  # type: ignore[misc]
                [group.buffers[i] for i in have],
                fused=True,
                found_inf=found_inf,
                weight_decay=group.decay,
                momentum=self.momentum,
                lr=self.rate * group.factor,
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )

    def zero_grad(self) -> None:
        """No weight has a gradient any more."""
        for p in self.momenta():
            p.grad = None

    def set_rate(self, rate: float) -> None:
        """The rate of the next steps; velocities keep their values."""
        if rate == self.rate:
            return
        self.before_change()
        for buffer in self.momenta().values():
            buffer.mul_(self.rate / rate)
        self.rate = rate

    def momenta(self) -> dict[nn.Parameter, Tensor]:
        """The buffer of each parameter that is trained: zeros before its first step."""
        return {
            p: buffer
            for group in self._groups
            for p, buffer in zip(group.weights, group.buffers, strict=True)
        }
