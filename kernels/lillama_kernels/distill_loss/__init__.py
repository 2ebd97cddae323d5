"""The distillation loss of one block."""

from lillama_kernels.distill_loss.op import distill_loss, distill_loss_and_grad

__all__ = ["distill_loss", "distill_loss_and_grad"]
