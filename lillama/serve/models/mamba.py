"""Mamba-1 on slots: a state of fixed size a request, and a decode step of our own.

transformers' forward costs more in Python than the arithmetic of a small model, and its cache holds
one batch from beginning to end. Here the convolution's and the scan's states are [L, slots, ...]
tensors, and a step is a plain sequence of operations on views of the first rows. Letters: L layers,
b rows of a step, T tokens, H hidden_size, D channels, S state size, W width of the filter.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lillama_kernels import (
    MixerWeights,
    causal_conv1d,
    causal_conv1d_update,
    mamba_mixer_step,
    mamba_mixer_step_runs_triton,
    selective_scan,
    selective_state_update,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from lillama.errors import InputError
from lillama.modules.low_rank_linear import LowRankLinear
from lillama.serve.models.runner import Prefilled, Runner, lay_out, lookup, projection

__all__ = ["MambaRunner"]

# The state does not grow with the text; this only keeps a request from running for ever.
NO_LIMIT = 2**20
LOG2_E = math.log2(math.e)


class _Rows(NamedTuple):
    """Views of the first b slots of one layer: conv [b, D, W-1] and ssm [b, D, S]; and the same
    with channels last."""

    conv: Tensor
    ssm: Tensor
    conv_last: Tensor
    ssm_last: Tensor


class MambaRunner(Runner):
    """A `Runner` for Mamba-1, dense or with factorised projections, in eval mode; max_length None
    is 2^20, for the state does not grow. Raises as `check`."""

    def __init__(self, model: PreTrainedModel, slots: int, max_length: int | None) -> None:
        config: Any = model.config
        self.max_length = self.check(config, max_length)
        backbone: Any = model.get_submodule("backbone")
        head: Any = model.get_submodule("lm_head")
        self.device = model.device
        self.vocab_size = head.weight.shape[0]
        self._dtype = backbone.embeddings.weight.dtype
        self._head_dtype = head.weight.dtype
        self._stream = torch.float32 if config.residual_in_fp32 else self._dtype
        self._embed = lookup(backbone.embeddings)
        self._head = projection(head, self.device)
        self._norm_f = backbone.norm_f.weight.to(self._stream)
        self._eps = backbone.norm_f.variance_epsilon
        self._mixers = [_Mixer(block, self.device) for block in backbone.layers]
        mixer = backbone.layers[0].mixer
        channels, width = mixer.intermediate_size, mixer.conv_kernel_size
        self._conv = self._zeros(slots, channels, width - 1, self._dtype)
        self._ssm = self._zeros(slots, channels, mixer.ssm_state_size, torch.float32)
        self._rows: dict[int, list[_Rows]] = {}

    @staticmethod
    def check(config: Any, max_length: int | None) -> int:
        """Return max_length, resolved; raise InputError for an activation other than silu."""
        if config.hidden_act not in ("silu", "swish"):
            act = f"the model's hidden_act is {config.hidden_act!r}"
            raise InputError(f"{act}; the engine serves Mamba with silu only")
        return NO_LIMIT if max_length is None else max_length

    def _zeros(self, slots: int, channels: int, size: int, dtype: torch.dtype) -> Tensor:
        """Return zeros [L, slots, D, size]. On a CPU channels lie side by side: sums over S or W
        then run over whole vectors, 2x to 6x faster; the GPU's kernels want size side by side."""
        count = len(self._mixers)
        if self.device.type == "cpu":
            return torch.zeros(count, slots, size, channels, dtype=dtype).transpose(2, 3)
        return torch.zeros(count, slots, channels, size, dtype=dtype, device=self.device)

    def chunk(self, ids: Tensor, state: Any) -> Prefilled:
        states = state or [None] * len(self._mixers)
        x = self._embed(ids[None]).to(self._stream)
        after = []
        for mixer, before in zip(self._mixers, states, strict=True):
            y, reached = mixer.chunk(x.to(self._dtype), before)
            x = x + y
            after.append(reached)
        return Prefilled(self._logits(x[:, -1]), after)

    def place(self, slot: int, state: Any) -> None:
        for index, (conv, ssm) in enumerate(state):
            self._conv[index, slot].copy_(conv[0])
            self._ssm[index, slot].copy_(ssm[0])

    def move(self, source: int, target: int) -> None:
        self._conv[:, target] = self._conv[:, source]
        self._ssm[:, target] = self._ssm[:, source]

    def step(self, ids: Tensor, shape: int) -> Tensor:
        batch = len(ids)
        if batch not in self._rows:
            self._rows[batch] = [
                _Rows(conv, ssm, conv.mT, ssm.mT)
                for conv, ssm in zip(self._conv[:, :batch], self._ssm[:, :batch], strict=True)
            ]
        on_cpu = self.device.type == "cpu"
        x = self._embed(ids).to(self._stream)
        for mixer, rows in zip(self._mixers, self._rows[batch], strict=True):
            x = x + (mixer.step_cpu if on_cpu else mixer.step)(x.to(self._dtype), rows)
        return self._logits(x)

    def _logits(self, x: Tensor) -> Tensor:
        x = F.rms_norm(x, x.shape[-1:], self._norm_f, self._eps)
        return self._head(x.to(self._head_dtype))


class _Mixer:
    """A block, as a chunk and a step read it: conv [D, W], dt [D, P], rate [D, S] fp32."""

    def __init__(self, block: Any, device: torch.device) -> None:
        mixer = block.mixer
        self.norm, self.eps = block.norm.weight, block.norm.variance_epsilon
        self.fused = _fused(mixer)
        self.into = projection(mixer.in_proj, device)
        self.conv, self.conv_bias = mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias
        self.x_proj = projection(mixer.x_proj, device)
        # of dt, B and C in x_proj's output
        self.sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
        self.dt, self.dt_bias = lay_out(mixer.dt_proj.weight), mixer.dt_proj.bias
        self.rate, self.skip = -torch.exp(mixer.A_log.float()), mixer.D
        self.out = projection(mixer.out_proj, device)
        # for the CPU's step: [W, D] and [S, D], channels side by side
        self.taps = self.conv.t().contiguous()
        self.log2_rate = (self.rate * LOG2_E).t().contiguous()

    def _normed(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.norm, self.eps)

    def chunk(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [1, T, H] after the tokens in state (conv [1, D, W-1], ssm [1, D, S]; None: the first)
        -> y [1, T, H] and the state after them."""
        u, z = self.into(self._normed(x)).mT.chunk(2, dim=1)
        past = self.conv.shape[1] - 1
        before, last = (u.new_zeros(1, u.shape[1], past), None) if state is None else state
        conv = torch.cat([before, u[..., -past:]], dim=2)[..., -past:] if past else before
        u = causal_conv1d(u, self.conv, self.conv_bias, "silu", initial_state=before)
        dt, B, C = self.x_proj(u.mT).split(self.sizes, dim=-1)
        y, last = selective_scan(
            u, self.dt @ dt.mT, self.rate, B.mT, C.mT, self.skip.float(), z,
            delta_bias=self.dt_bias.float(), delta_softplus=True, initial_state=last,
        )  # fmt: skip
        return self.out(y.mT), (conv, last)

    def step(self, x: Tensor, rows: _Rows) -> Tensor:
        """Step one token x [b, H] -> [b, H] by our kernels: one fused operation where it runs, else
        one each for the convolution and the scan."""
        x = self._normed(x)
        if self.fused is not None and mamba_mixer_step_runs_triton(x, self.fused):
            return mamba_mixer_step(x, rows.conv, rows.ssm, self.fused)
        u, z = self.into(x).chunk(2, dim=-1)
        u = causal_conv1d_update(u[..., None], rows.conv, self.conv, self.conv_bias, "silu")
        u = u[..., 0]
        dt, B, C = self.x_proj(u).split(self.sizes, dim=-1)
        y = selective_state_update(
            rows.ssm, u, F.linear(dt, self.dt), self.rate, B, C, self.skip, z,
            dt_bias=self.dt_bias, dt_softplus=True,
        )  # fmt: skip
        return self.out(y)

    def step_cpu(self, x: Tensor, rows: _Rows) -> Tensor:
        """Do what `step` does, in as few of PyTorch's calls as it takes, in the dtype of x."""
        u, z = self.into(self._normed(x)).chunk(2, dim=-1)
        window = torch.cat([rows.conv_last, u[:, None]], dim=1)  # [b, W, D]
        rows.conv_last.copy_(window[:, 1:])
        u = (window * self.taps).sum(1)
        if self.conv_bias is not None:
            u += self.conv_bias
        u = F.silu(u)
        dt, B, C = self.x_proj(u).split_with_sizes(self.sizes, dim=-1)
        step = F.softplus(F.linear(dt, self.dt, self.dt_bias).float())  # [b, D]
        state = rows.ssm_last  # [b, S, D]
        state.mul_((step[:, None] * self.log2_rate).exp2_())
        state.addcmul_((step * u)[:, None], B[..., None])
        y = torch.bmm(C[:, None].float(), state)[:, 0].addcmul_(u, self.skip)
        return self.out((y * F.silu(z)).to(x.dtype))


def _fused(mixer: Any) -> MixerWeights | None:
    """Return the weights of the GPU's fused step; None where in_proj or out_proj has no factors."""
    into, x_proj, out = mixer.in_proj, mixer.x_proj, mixer.out_proj
    if not (isinstance(into, LowRankLinear) and isinstance(out, LowRankLinear)):
        return None
    if not isinstance(x_proj, nn.Linear | LowRankLinear):
        return None
    # a low-rank x_proj is multiplied out: it is small, and the step stays one operation
    return MixerWeights(
        in_A=into.lr_A, in_B=into.lr_B, in_bias=into.bias, conv=mixer.conv1d.weight.squeeze(1),
        conv_bias=mixer.conv1d.bias, x_proj=x_proj.weight.detach(), dt=mixer.dt_proj.weight,
        dt_bias=mixer.dt_proj.bias, A_log=mixer.A_log, D=mixer.D, out_A=out.lr_A, out_B=out.lr_B,
        out_bias=out.bias,
    )  # fmt: skip
