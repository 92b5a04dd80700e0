"""Statistics of batch norms, which a step changes before anybody knows that it is skipped."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class RunningStatistics:
    """Keeps the statistics of a network's batch norms over a step, to put them back.

    Args:
        model: The network; costs nothing when it has no batch norm that is in training.
    """

    def __init__(self, model: nn.Module) -> None:
        self._norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._saved: list[tuple[list[Tensor], Tensor]] = []

    def save(self) -> None:
        """Note the statistics before a step."""
        norms = [norm for norm in self._norms if norm.training and norm.track_running_stats]
        # By type: means and variances are floats, the counters are integers.
        floats = [b for norm in norms for b in (norm.running_mean, norm.running_var)]
        counters = [norm.num_batches_tracked for norm in norms]
        kinds = [[b for b in kind if b is not None] for kind in (floats, counters)]
        self._saved = [(buffers, _join(buffers)) for buffers in kinds if buffers]

    def restore_unless(self, is_finite: Tensor) -> None:
        """Put them back where the step was not finite, without asking the device which it is."""
        for buffers, saved in self._saved:
            kept = torch.where(is_finite, _join(buffers), saved)
            parts = torch.split(kept, [buffer.numel() for buffer in buffers])
            torch._foreach_copy_(
                buffers, [p.view(b.shape) for p, b in zip(parts, buffers, strict=True)]
            )
        self._saved = []


def _join(buffers: list[Tensor]) -> Tensor:
    # One tensor: a kernel for each of a hundred small ones would cost more than the copying.
    return torch.cat([buffer.reshape(-1) for buffer in buffers])
