"""What an encoder is here: the blocks before the decoder's, which hear clips instead of reading
tokens, and whose last states every decoder block is given.

Blocks are numbered through, the encoder's first. Three things change at the border: the rows (a
clip's S positions, then the T tokens of its transcript), how a half's first states come about, and
one argument of the blocks, `encoder_hidden_states`, which differs from row to row and is not the
same for teacher and student: their encoders' states.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from lillama.audio import AudioClips
from lillama.compress.activations import ActivationStore
from lillama.compress.arguments import blocks_as
from lillama.compress.blocks import TeacherBlocks
from lillama.data import TokenBlocks
from lillama.families import Family, is_speech

__all__ = ["STATES", "Encoded", "EncoderDecoderBlocks", "teacher_blocks"]

# the argument of a decoder block
STATES = "encoder_hidden_states"


@dataclass(frozen=True)
class Encoded:
    """What the encoder puts out, stores of [n, S, H]: on the teacher's stream and the student's,
    the same object while no block of it was compressed."""

    teacher: ActivationStore
    student: ActivationStore

    @property
    def diverged(self) -> bool:
        return self.student is not self.teacher

    def arguments(
        self, rows: Tensor, streams: Sequence[str], device: torch.device
    ) -> dict[str, Tensor]:
        """For a decoder block that runs the rows [b] of these streams ("teacher", "student") as one
        batch: {name: [streams * b, S, H] fp32}."""
        states = [getattr(self, name).read(rows).to(device, torch.float32) for name in streams]
        return {STATES: torch.cat(states) if len(states) > 1 else states[0]}


class EncoderDecoderBlocks(TeacherBlocks):
    """Of a model with an encoder; as its base class, whose `arguments`, `inputs` and `logits` are
    the decoder's."""

    def rows_of(self, part: TokenBlocks, index: int) -> TokenBlocks | AudioClips:
        if index >= self.num_encoder:
            return part
        assert part.clips is not None
        return part.clips

    def first_states(self, part: TokenBlocks | AudioClips, rows: Tensor) -> Tensor:
        if isinstance(part, TokenBlocks):
            return super().first_states(part, rows)
        features = part.features(rows.tolist()).to(self.device, self.dtype)
        return self._record(None, self.blocks[: self.num_encoder], input_features=features)[0]

    def arguments_of(
        self, index: int, shape: tuple[int, int], mask: Tensor | None
    ) -> dict[str, Any]:
        """Without the encoder's states, which `Encoded` has."""
        if index < self.num_encoder:
            blocks, features = self.blocks[: self.num_encoder], self._silence(shape[0])
            return self._record(None, blocks, input_features=features)[1][index]
        found = self.arguments(shape, mask)[index - self.num_encoder]
        return {name: value for name, value in found.items() if name != STATES}

    def encoded(self, hidden: Tensor) -> Tensor:
        """What the encoder makes of the states [b, S, H] behind its last block."""
        with blocks_as(self.blocks[: self.num_encoder], lambda *args, **kwargs: hidden):
            found = self._run(None, input_features=self._silence(len(hidden)))
        return found.last_hidden_state

    def _silence(self, count: int) -> Tensor:
        """Features of no clip, for what does not depend on them."""
        config = self.model.config
        shape = (count, config.num_mel_bins, 2 * config.max_source_positions)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def _run(
        self, mask: Tensor | None, weights: dict[str, Tensor] | None = None, **inputs: Any
    ) -> Any:
        if "input_features" in inputs:
            return self.model.get_encoder()(**inputs)
        ids = next(iter(inputs.values()))
        # the blocks that would look at it are not run
        nothing = torch.zeros(
            len(ids), 1, self.model.config.hidden_size, dtype=self.dtype, device=self.device
        )
        given = {f"decoder_{name}": value for name, value in inputs.items()}
        given["decoder_attention_mask"] = None if mask is None else mask.to(self.device, torch.long)
        given |= {"encoder_outputs": (nothing,), "use_cache": False}
        return functional_call(self.model, weights, (), given) if weights else self.model(**given)


def teacher_blocks(
    path: Path, config: Any, family: Family, device: torch.device, dtype: torch.dtype
) -> TeacherBlocks:
    """The blocks of a model of either kind; arguments and errors as `TeacherBlocks`."""
    kind = EncoderDecoderBlocks if is_speech(config) else TeacherBlocks
    return kind(path, config, family, device, dtype)
