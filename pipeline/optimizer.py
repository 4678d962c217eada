"""The paper's SGD (section 5)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class SGD(torch.optim.SGD):
    """v = momentum * v - decay * rate * w - rate * gradient; w += v.

    The rate stands inside the velocity, unlike in `torch.optim.SGD`, which this is otherwise: there
    the buffer is -v / rate, so that it only has to be rescaled when the rate changes. Biases learn
    at `bias_rate` times the rate and decay only if `decay_bias` (source: 2 and not). Weights that
    need no gradient stay as they are.
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
        def group(suffix: str, factor: float, decay: float) -> dict[str, object]:
            params = [p for n, p in weights.items() if n.endswith(suffix) and p.requires_grad]
            return {"params": params, "factor": factor, "weight_decay": decay, "lr": rate * factor}

        groups = [
            group(".weight", 1.0, decay),
            group(".bias", bias_rate, decay if decay_bias else 0.0),
        ]
        super().__init__(groups, lr=rate, momentum=momentum, fused=True)
        self.rate = rate
        self.before_change: Callable[[], None] = lambda: None
        """Called before weights or velocities change: a checkpoint may still be copying them."""
        self.register_step_pre_hook(lambda *_: self.before_change())

    def step_if(self, finite: Tensor) -> None:
        """A step, or none at all unless `finite`, bool [] on the weights' device, for which the
        host does not wait.
        """
        self.momenta()  # or a first step that is none would leave buffers unset
        self.found_inf = (~finite).float()  # read by `torch.optim.SGD`
        self.step()

    def set_rate(self, rate: float) -> None:
        """The rate of the next steps; velocities keep their values."""
        self.rate = rate
        for group in self.param_groups:
            new = rate * group["factor"]
            if new == group["lr"]:
                continue
            self.before_change()
            for p in group["params"]:
                buffer = self.state[p].get("momentum_buffer")
                if buffer is not None:
                    buffer.mul_(group["lr"] / new)
            group["lr"] = new

    def restore_rate(self, rate: float) -> None:
        """The rate that buffers loaded from elsewhere belong to; they stay as they are."""
        self.rate = rate
        for group in self.param_groups:
            group["lr"] = rate * group["factor"]

    def momenta(self) -> dict[nn.Parameter, Tensor]:
        """The buffer of each parameter that is trained, zeros where it has not been stepped yet."""
        for group in self.param_groups:
            for p in group["params"]:
                if self.state[p].get("momentum_buffer") is None:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return {
            p: self.state[p]["momentum_buffer"]
            for group in self.param_groups
            for p in group["params"]
        }
