"""The GPU that Ray has given to this process."""

from __future__ import annotations

import ray
import torch

from workers.config import UserError
from workers.errors import first_line


def gpu() -> torch.device:
    """It. Raises UserError if Ray has counted one that torch cannot use."""
    try:
        return torch.zeros(1, device=torch.device("cuda", 0)).device
    except (RuntimeError, AssertionError) as error:  # the latter without CUDA in torch
        where = ray.util.get_node_ip_address()
        raise UserError(
            f"torch {torch.__version__} cannot use the GPU of {where}: {first_line(error)}; "
            "--device cpu does without"
        ) from None
