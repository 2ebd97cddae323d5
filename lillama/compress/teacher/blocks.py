"""The teacher, one block at a time: weights straight from the shards, inputs as the model itself
prepares them."""

import contextlib
import functools
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.func import functional_call
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from lillama.checkpoint.format import TensorHeader, hub_headers, read_headers
from lillama.compress.teacher.arguments import blocks_as, by_name, check_arguments
from lillama.compress.teacher.experts import dense_experts_forward, experts_of
from lillama.errors import InputError, RunError
from lillama.models.dense_linear import is_transposed
from lillama.models.families import FAMILIES, Family
from lillama.models.skeleton import block_list, named_blocks, skeleton

__all__ = ["TeacherBlocks", "block_output"]

logger = logging.getLogger(__name__)


class _Stop(Exception):
    """Raised by the last block's recorder: nothing after the blocks is loaded."""


class TeacherBlocks:
    """A model on the meta device whose blocks and embeddings are loaded on demand.

    Args:
        path: checkpoint folder. config, family: what it holds. device, dtype: where and in what
        blocks run.

    Raises:
        InputError: tensors are missing from the checkpoint.
    """

    def __init__(
        self, path: Path, config: Any, family: Family, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.family = family
        self.device = device
        self.dtype = dtype
        self.model = skeleton(config)
        self.block_path, self.blocks = block_list(self.model)
        self.block_paths = list(named_blocks(self.model))
        self.headers = hub_headers(read_headers(path), family, self.block_path)
        self._transposed = {
            path for path, module in self.model.named_modules() if is_transposed(module)
        }
        self._open: dict[Path, Any] = {}
        meta = self.model.state_dict()
        self.runtime = self._runtime_names(meta)
        if len(self.runtime) < len(self.headers):
            unknown = sorted(set(self.headers) - set(self.runtime))
            logger.warning(
                "%s holds %d tensors that the model does not use; they are left out: %s%s",
                path, len(unknown), ", ".join(unknown[:3]), ", ..." if len(unknown) > 3 else "",
            )  # fmt: skip
        tied = set(getattr(self.model, "all_tied_weights_keys", {}) or {})
        missing = sorted(set(meta) - set(self.runtime.values()) - tied)
        if missing:
            raise InputError(
                f"{path} lacks tensors the model needs: {', '.join(missing[:5])}"
                + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            )
        self._fill_buffers()
        present, embeddings = dict(self.model.named_modules()), self.model.get_input_embeddings()
        self._embeddings = next(n for n, module in present.items() if module is embeddings)
        self._loaded: set[nn.Module] = set()
        self._checked = family.model_type in FAMILIES  # whose tests do
        # whether the model takes the first of what a block returns; seen when it runs
        self._in_tuples = False
        self._before = [name for name in family.before_blocks if name in present]
        for name in self._before:
            # small, and needed for every batch
            self._loaded.add(self._load(name).to(dtype))

    def _runtime_names(self, meta: dict[str, Tensor]) -> dict[str, str]:
        """{hub tensor name: runtime parameter it becomes (part of)}."""
        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        return {
            name: target
            for name in self.headers
            if (
                target := rename_source_key(
                    name, renamings, converters, self.model.base_model_prefix, meta
                )[0]
            )
            in meta
        }

    def check_names(self, matrices: Iterable[str]) -> None:
        """Raises InputError where the checkpoint calls a matrix otherwise than the family does."""
        other = [name for name in matrices if f"{name}.weight" not in self.headers]
        if other:
            raise InputError(
                f"the checkpoint has no {other[0]}.weight, it calls its tensors otherwise; load it "
                "with AutoModelForCausalLM and save it with save_pretrained first"
            )

    def _fill_buffers(self) -> None:
        """Non-persistent buffers (rotary frequencies) are in no checkpoint: let the model
        initialise them."""
        for name, buffer in list(self.model.named_non_persistent_buffers()):
            parent, _, key = name.rpartition(".")
            setattr(
                self.model.get_submodule(parent), key, torch.empty_like(buffer, device=self.device)
            )
        owners = {name.rpartition(".")[0] for name, _ in self.model.named_non_persistent_buffers()}
        for name in owners:
            self.model._init_weights(self.model.get_submodule(name))
        self._buffers = dict(self.model.named_non_persistent_buffers())

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            # not mapped: pages of a mapping stay in memory and would count as ours
            self._open[file] = safe_open(file, "pt", backend="pread")
        return self._open[file]

    def hub_names(self, prefix: str) -> list[str]:
        """Hub names of the tensors that belong to the runtime module `prefix`."""
        return [name for name, target in self.runtime.items() if target.startswith(f"{prefix}.")]

    def read(self, hub_name: str) -> Tensor:
        """One tensor of the checkpoint, on the CPU, in its own dtype.

        Raises:
            RunError: the shard vanished or cannot be read, or the tensor holds NaN or infinity.
        """
        header: TensorHeader = self.headers[hub_name]
        try:
            tensor = self._handle(header.file).get_tensor(header.stored_name or hub_name)
        except (OSError, SafetensorError) as error:
            raise RunError(f"cannot read {hub_name} from {header.file}: {error}") from error
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise RunError(f"the weight {hub_name} holds NaN or infinity; repair the checkpoint")
        return tensor

    def matrix(self, name: str) -> Tensor:
        """The weight [N, K] of the matrix with this hub name, otherwise as `read`."""
        weight = self.read(f"{name}.weight")
        return weight.mT.contiguous() if name in self._transposed else weight

    def shape(self, name: str) -> tuple[int, int]:
        """(N, K) of the same."""
        N, K = self.headers[f"{name}.weight"].shape
        return (K, N) if name in self._transposed else (N, K)

    def _load(self, prefix: str) -> nn.Module:
        self._load_names(self.hub_names(prefix), prefix)
        return self.model.get_submodule(prefix).requires_grad_(False)

    def _release(self, prefix: str) -> None:
        """Give the weights of a runtime module back, not the buffers that are in no checkpoint."""
        self.model.get_submodule(prefix).to_empty(device="meta")
        for name, buffer in self._buffers.items():
            if name.startswith(f"{prefix}."):
                parent, _, key = name.rpartition(".")
                setattr(self.model.get_submodule(parent), key, buffer)

    def _load_names(self, names: list[str], prefix: str) -> None:
        """Fill the parameters that these tensors become; `prefix` is for messages."""
        mapping: Any = get_model_conversion_mapping(self.model)
        try:
            slices = {}
            for name in names:
                header = self.headers[name]
                stored = header.stored_name or name
                slices[name] = self._handle(header.file).get_slice(stored)
        except (OSError, SafetensorError) as error:
            raise RunError(f"cannot read the shards of {prefix}: {error}") from error
        info, _ = convert_and_load_state_dict_in_model(
            self.model,
            slices,
            # dtype None: as stored
            LoadStateDictConfig(device_map={"": self.device}, dtype=None, weight_mapping=mapping),
            None,
        )
        if info.mismatched_keys or info.conversion_errors:
            bad = info.mismatched_keys or info.conversion_errors
            raise InputError(f"{prefix} does not fit config.json: {bad}")
        loaded = self.model.state_dict()
        for name in {self.runtime[name] for name in names}:
            if not _finite(loaded[name]):
                raise RunError(f"the weight {name} holds NaN or infinity; repair the checkpoint")

    def _widen(self, block: nn.Module) -> None:
        """Everything in the dtype to compute in, but for stacked experts: they are nearly all of a
        block and are widened one by one while they run."""
        experts = experts_of(self.family, block)
        stacked = set() if experts is None else {id(p) for p in experts.parameters()}
        for parameter in block.parameters():
            if id(parameter) not in stacked:
                parameter.data = parameter.data.to(self.dtype)
        for buffer in block.buffers():
            if buffer.is_floating_point():
                buffer.data = buffer.data.to(self.dtype)
        if experts is not None:
            experts.forward = functools.partial(dense_experts_forward, experts)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with its weights, in eval mode; released on leaving.

        Raises:
            RunError: a weight is NaN or infinite (named), or a shard cannot be read.
        """
        path = self.block_paths[index]
        module = self._load(path)
        self._widen(module)
        try:
            yield module.eval()
        finally:
            experts = experts_of(self.family, module)
            if experts is not None:
                experts.__dict__.pop("forward", None)
            self._release(path)

    @contextmanager
    def embeddings(self, factors: tuple[Tensor, Tensor] | None = None) -> Iterator[None]:
        """The token embeddings, or the product B A of their factors A [R, H] and B [V, R], for
        `inputs` with token ids; released on leaving.

        Raises:
            RunError: as `block`.
        """
        module = self._load(self._embeddings).to(self.dtype)
        if factors is not None:
            A, B = factors
            torch.mm(B.to(self.dtype), A.to(self.dtype), out=module.get_parameter("weight").data)
        try:
            yield
        finally:
            self._release(self._embeddings)

    @contextmanager
    def head(self) -> Iterator[None]:
        """Everything outside the blocks, for `logits`; released on leaving.

        Raises:
            RunError: as `block`.
        """
        there = tuple(f"{path}." for path in (self.block_path, *self._before))
        outside = [name for name, target in self.runtime.items() if not target.startswith(there)]
        self._load_names(outside, "what is outside the blocks")
        self.model.tie_weights()
        modules = [m for name, m in self.model.named_modules() if self._is_outside(name, m)]
        for module in modules:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False).data = parameter.data.to(self.dtype)
        try:
            yield
        finally:
            for module in modules:
                for name, parameter in list(module.named_parameters(recurse=False)):
                    empty = torch.empty_like(parameter, device="meta")
                    setattr(module, name, nn.Parameter(empty, requires_grad=False))
            self.model.tie_weights()

    def _is_outside(self, name: str, module: nn.Module) -> bool:
        own = any(True for _ in module.parameters(recurse=False))
        inside = f"{name}.".startswith(f"{self.block_path}.")
        return own and not inside and module not in self._loaded

    def logits(
        self, hidden: Tensor, mask: Tensor | None, weights: dict[str, Tensor] | None = None
    ) -> Tensor:
        """The model's prediction [b, T, V] from the states [b, T, H] behind its last block, with
        `weights` (by runtime name) in place of its own. Inside `head` only."""
        # what a model makes of its embeddings before the blocks (positions, a scale) is not done
        # again: every block puts out `hidden`, whatever reaches it
        with blocks_as(self.blocks, lambda *args, **kwargs: self._returned(hidden)):
            nothing = self._nothing(*hidden.shape[:2])
            return self._run(mask, weights, inputs_embeds=nothing).logits

    def _returned(self, hidden: Tensor) -> Any:
        return (hidden,) if self._in_tuples else hidden

    def _nothing(self, *shape: int) -> Tensor:
        """Embeddings of no token, for what does not depend on them."""
        embeddings: Any = self.model.get_input_embeddings()
        return torch.zeros(*shape, embeddings.embedding_dim, dtype=self.dtype, device=self.device)

    def arguments(self, shape: tuple[int, int], mask: Tensor | None) -> list[dict[str, Any]]:
        """The keyword arguments of each block for `shape` = (b, T); see `inputs`."""
        return self._record(mask, inputs_embeds=self._nothing(*shape))[1]

    def inputs(self, input_ids: Tensor, mask: Tensor | None) -> tuple[Tensor, list[dict[str, Any]]]:
        """What the model would feed its blocks: hidden states of block 0 and the keyword arguments
        of each.

        input_ids [b, T], mask [b, T] bool or None -> hidden [b, T, H] and one dict a block (masks,
        rotary embeddings), the same objects where the model shares them. Inside `embeddings` only.
        """
        found = self._record(mask, input_ids=input_ids.to(self.device))
        if not self._checked:
            self._checked = True
            others = self.arguments((input_ids.shape[0], input_ids.shape[1]), mask)
            check_arguments(self.model.config.model_type, found[1], others)
        return found

    def embedded(self, embeddings: Tensor, mask: Tensor | None) -> Tensor:
        """What the model makes of its embeddings [b, T, H] before its first block (positions, a
        scale), for gradients at them: hidden states of block 0, as in `inputs`."""
        return self._record(mask, inputs_embeds=embeddings)[0]

    def _record(self, mask: Tensor | None, **inputs: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Return the states before block 0, and what each block is called with."""
        hidden: list[Tensor] = []
        calls: list[dict[str, Any]] = []
        last = len(self.blocks) - 1

        def recorder(*args: Any, **kwargs: Any) -> Any:
            states, given = by_name(self.blocks[len(calls)], args, kwargs)
            hidden.append(states)
            self._in_tuples |= states.ndim < hidden[0].ndim
            calls.append(given)
            if len(calls) > last:
                raise _Stop
            return self._returned(states)

        grad = torch.set_grad_enabled(any(value.requires_grad for value in inputs.values()))
        with grad, contextlib.suppress(_Stop), blocks_as(self.blocks, recorder):
            self._run(mask, None, **inputs)
        return hidden[0], calls

    def _run(
        self, mask: Tensor | None, weights: dict[str, Tensor] | None = None, **inputs: Any
    ) -> Any:
        attention_mask = None if mask is None else mask.to(self.device, torch.long)
        given = {**inputs, "attention_mask": attention_mask, "use_cache": False}
        return functional_call(self.model, weights, (), given) if weights else self.model(**given)


def _finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity; looks at one slice of the first axis at a time
    where it has three."""
    parts = tensor if tensor.ndim == 3 else [tensor]
    return all(bool(torch.isfinite(part).all()) for part in parts)


def block_output(block: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """A block's new hidden states, whether it returns them bare or first in a tuple."""
    out = block(hidden, **kwargs)
    return out[0] if isinstance(out, tuple) else out
