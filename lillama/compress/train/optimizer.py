"""What trains a whole factorised model: Muon for the matrices of its blocks, AdamW for the rest."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lillama.modules.low_rank_experts import LowRankExperts
from lillama.modules.low_rank_linear import LowRankLinear, PivotLowRankLinear

__all__ = ["WholeOptimizer"]

# experts in the pivot gauge are LowRankExperts too
WITH_MATRICES = (nn.Linear, LowRankLinear, PivotLowRankLinear, LowRankExperts)


def _matrices(model: PreTrainedModel, trained: Mapping[str, Tensor]) -> set[str]:
    """Names of the trained weights and factors of linear layers and stacked experts. Not those of
    the embeddings and the head, whose rows see few tokens each."""
    outside = (model.get_input_embeddings(), model.get_output_embeddings())
    return {
        name
        for path, module in model.named_modules()
        if isinstance(module, WITH_MATRICES) and module not in outside
        for name, value in module.named_parameters(prefix=path, recurse=False)
        if name in trained and value.ndim > 1 and value.numel()
    }


class WholeOptimizer:
    """One rate for both: Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) takes
    orthogonalised steps as long as those of AdamW (Liu et al., arXiv 2502.16982, section 2.2).

    Muon is for matrices [N, K]; each expert of a stack [E, N, K] is one. Rows and columns of
    padding, whose gradient is 0, stay 0.

    Args:
        model: whose parameters they are. trained: by name; the others stay. weight_decay: of both.
    """

    def __init__(
        self, model: PreTrainedModel, trained: Mapping[str, nn.Parameter], weight_decay: float
    ) -> None:
        names = _matrices(model, trained)
        whole = [p for name, p in trained.items() if name in names and p.ndim == 2]
        # an expert is a parameter of its own in the memory of its stack
        self._experts = {
            stack: [nn.Parameter(expert) for expert in stack.detach()]
            for name, stack in trained.items()
            if name in names and stack.ndim == 3
        }
        matrices = whole + [part for parts in self._experts.values() for part in parts]
        rest = [p for name, p in trained.items() if name not in names]
        self._optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            self._optimizers.append(
                torch.optim.Muon(
                    matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
                )
            )
        if rest:
            self._optimizers.append(torch.optim.AdamW(rest, weight_decay=weight_decay, fused=True))

    def step(self, rate: float) -> None:
        """One step of every trained parameter with the gradients that it holds; drops these."""
        for stack, parts in self._experts.items():
            if stack.grad is not None:
                for part, gradient in zip(parts, stack.grad, strict=True):
                    part.grad = gradient
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for stack in self._experts:
            stack.grad = None
