"""Every default of the project, in frozen dataclasses, one a command. Nothing else holds one, and
this file imports nothing heavy: the command line reads it to show its help."""

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from lillama.errors import InputError

if TYPE_CHECKING:
    from lillama.data.datasets import HubText

__all__ = [
    "PRESETS",
    "RANK_MULTIPLE",
    "Budget",
    "CompressConfig",
    "EvalConfig",
    "ExportConfig",
    "ExportFormat",
    "FinetuneConfig",
    "Gauge",
    "GenerateConfig",
    "Loss",
    "LossForm",
    "Metric",
    "PlanConfig",
    "Preset",
    "Recipe",
    "ReportConfig",
    "SampleConfig",
    "ServeConfig",
    "Strategy",
    "check_at_least",
    "check_choice",
    "check_device",
    "parse_bytes",
]

# hidden states of a batch that gradients go through: 512 tokens of 4096
GRADIENT_NUMBERS = 2**21
# what `Recipe.tokens_per_width` leaves a narrow model
LEAST_TOKENS = 65_536
Preset = Literal["default", "fast", "best", "whitened", "paper"]
Strategy = Literal["global", "uniform", "bottom"]
Loss = Literal["joint", "teacher", "student"]
LossForm = Literal["l1_cosine", "nmse"]
Gauge = Literal["plain", "pivot"]
Budget = Literal["stored", "active"]
ExportFormat = Literal["dense", "plain", "pivot"]
Dtype = Literal["auto", "float32", "float16", "bfloat16"]
DTYPES = get_args(Dtype)
Metric = Literal["blocks", "rows", "words"]
# tokens of a block; rows: as GPTQ's and SparseGPT's tables; words: the model's context
EVAL_SEQ_LEN: dict[str, int | None] = {"blocks": 512, "rows": 2048, "words": None}

# Ranks are multiples of this: grouped matrix products need rows of 16 bytes (8 bf16 numbers).
RANK_MULTIPLE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a preset fixes. Sources: arXiv 2412.16719 and its code for `paper`, our measurements
    for `default`."""

    # fisher: as whitened, errors weighted by the loss's gradients
    init: Literal["svd", "whitened", "fisher"]
    # None: the strategy the paper used for the family (bottom for all transformers; Mamba's is
    # unknown: uniform)
    strategy: Strategy | None
    # learning rate at `learning_rate_width` = hidden_size; other widths scale it by the square
    # root of the ratio
    learning_rate: float
    learning_rate_width: int | None
    schedule: Literal["constant", "cosine"]
    warmup_fraction: float
    weight_decay: float
    gradient_clip: float | None
    batch_size: int = 8
    # share of the Gram's mean diagonal added to it before whitening; this much flattens all but the
    # strongest directions, which keeps what text of another kind needs (benchmarks/NOTES.md)
    shrinkage: float = 1.0
    # the same for the gradients' moment
    gradient_damping: float = 1.0
    # calibration tokens that gradients are taken from
    sensitivity_tokens: int = 65_536
    # whether embeddings and head may be factorised too where strategy "global" chooses the ranks
    vocabulary: bool = True
    # share of tokens, at the embeddings and as labels at the head, that count as drawn evenly from
    # the vocabulary: what text of another kind needs
    vocabulary_floor: float = 0.5
    # experts count with their share of those tokens, and to this part as if all had the same
    share_floor: float = 0.3
    # what a block's output is compared by: `lillama_kernels.distill_loss`
    form: LossForm = "nmse"
    # how often a block is judged on held-out tokens while it trains
    evaluations: int = 6
    # False: the factors stay as they were initialised
    train: bool = True
    # a factorised output head learns the teacher's predictions, as a last block
    train_head: bool = True
    # how often the whole model, after its blocks, learns the teacher's predictions of all tokens
    # (compress/finetune.py); 0: not at all
    finetune_epochs: int = 0
    # whether ranks and blocks are of text that the model writes, and the last stage of that and of
    # the text given
    finetune_own_text: bool = False
    # calibration tokens where the caller names no number; moments alone need few
    tokens: int = 2_000_000
    # where the caller names none
    gauge: Gauge = "pivot"
    # the most calibration tokens that a run takes for each of hidden_size, LEAST_TOKENS in any
    # case, gradients a quarter of them: moments of so many directions need no more
    # (benchmarks/NOTES.md); None: all asked for
    tokens_per_width: int | None = None

    def most_tokens(self, hidden_size: int) -> int | None:
        """Calibration tokens beyond which a run leaves them out; None: never."""
        if self.tokens_per_width is None:
            return None
        return max(LEAST_TOKENS, self.tokens_per_width * hidden_size)

    def gradient_tokens(self, hidden_size: int) -> int:
        """Calibration tokens that gradients are taken from, of as many as there are."""
        most = self.most_tokens(hidden_size)
        return self.sensitivity_tokens if most is None else min(self.sensitivity_tokens, most // 4)

    def gradient_rows(self, seq_len: int, hidden_size: int) -> int:
        """Sequences of a batch that gradients go through: what autograd keeps of it must stay small
        beside a large block."""
        return max(1, min(self.batch_size, GRADIENT_NUMBERS // (seq_len * hidden_size)))

    def peak_learning_rate(self, hidden_size: int) -> float:
        if self.learning_rate_width is None:
            return self.learning_rate
        return self.learning_rate * math.sqrt(self.learning_rate_width / hidden_size)


_DEFAULT = Recipe(
    init="fisher",
    strategy="global",
    learning_rate=2e-3,
    learning_rate_width=128,
    schedule="cosine",
    warmup_fraction=0.05,
    weight_decay=0.01,
    gradient_clip=1.0,
)
PRESETS: dict[str, Recipe] = {
    "default": _DEFAULT,
    "fast": dataclasses.replace(_DEFAULT, train=False, tokens=262_144, tokens_per_width=256),
    "best": dataclasses.replace(
        _DEFAULT, finetune_epochs=2, finetune_own_text=True, sensitivity_tokens=262_144
    ),
    "whitened": dataclasses.replace(
        _DEFAULT,
        init="whitened",
        strategy="uniform",
        shrinkage=3.0,
        vocabulary=False,
        gauge="plain",
    ),
    "paper": Recipe(
        init="svd",
        strategy=None,
        learning_rate=8.6e-5,
        learning_rate_width=None,
        schedule="constant",
        warmup_fraction=0.0,
        weight_decay=0.01,
        gradient_clip=None,
        form="l1_cosine",
        vocabulary=False,
        gauge="plain",
    ),
}


def check_choice(
    name: str, value: str | None, choices: tuple[str, ...], optional: bool = False
) -> None:
    if value not in choices and not (optional and value is None):
        raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_at_least(name: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise InputError(f"{name} must be at least {minimum}, got {value}")


def parse_bytes(name: str, text: str) -> int:
    """ "512MiB", "4GiB", "1.5GiB" or a plain number of bytes.

    Raises:
        InputError: anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KiB|MiB|GiB|TiB)?", text.strip())
    if found is None:
        raise InputError(f"{name} must be a size such as 512MiB or 4GiB, got {text!r}")
    power = ("", "KiB", "MiB", "GiB", "TiB").index(found[2] or "")
    return round(float(found[1]) * 1024**power)


def check_device(value: str) -> None:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise InputError(f"--device must be auto, cpu, cuda or cuda:N, got {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig:
    """Options of `lillama plan`."""

    model: Path
    reduction: float
    preset: Preset = "default"
    strategy: Strategy | None = None
    targets: tuple[str, ...] | None = None
    # None: the preset's
    gauge: Gauge | None = None
    # what `reduction` is a share of: bytes of the checkpoint, or parameters that one token uses
    budget: Budget = "stored"
    tokens: int | None = None
    seq_len: int = 512
    train: bool = True
    # host bytes for the streams between two blocks; what does not fit goes to files beside OUT
    activation_memory: int = 4 * 2**30

    def __post_init__(self) -> None:
        if not 0 < self.reduction < 1:
            raise InputError(
                "--reduction must lie between 0 and 1, both excluded (the share of the whole "
                f"model's parameters to remove), got {self.reduction}"
            )
        check_choice("--preset", self.preset, tuple(PRESETS))
        check_choice("--strategy", self.strategy, get_args(Strategy), optional=True)
        check_choice("--gauge", self.gauge, get_args(Gauge), optional=True)
        check_choice("--budget", self.budget, get_args(Budget))
        check_at_least("--tokens", self.num_tokens, 1)
        check_at_least("--seq-len", self.seq_len, 2)
        check_at_least("--activation-memory", self.activation_memory, 0)
        object.__setattr__(self, "train", self.train and self.recipe.train)

    @property
    def recipe(self) -> Recipe:
        return PRESETS[self.preset]

    @property
    def finetune(self) -> bool:
        """Whether the whole model is trained after its blocks."""
        return self.train and self.recipe.finetune_epochs > 0

    @property
    def num_tokens(self) -> int:
        """Calibration tokens."""
        return self.recipe.tokens if self.tokens is None else self.tokens

    def at_width(self, hidden_size: int) -> Self:
        """The same with no more calibration tokens than the preset has a use for."""
        most = self.recipe.most_tokens(hidden_size)
        if most is None or self.num_tokens <= most:
            return self
        return dataclasses.replace(self, tokens=most)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressConfig(PlanConfig):
    """Options of `lillama compress`."""

    out: Path
    # none: what the model writes by itself
    text: "tuple[Path | HubText, ...]" = ()
    loss: Loss = "joint"
    packing: bool = True
    seed: int = 0
    dtype: Dtype = "auto"
    device: str = "auto"
    # how often the state inside a block is saved
    checkpoint_seconds: float = 600.0
    # JSON lines are appended here while the run goes on
    events: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        PlanConfig.__post_init__(self)
        if not self.checkpoint_seconds >= 0:
            raise InputError(
                f"--checkpoint-seconds must be at least 0, got {self.checkpoint_seconds}"
            )
        check_choice("--loss", self.loss, get_args(Loss))
        check_choice("--dtype", self.dtype, DTYPES)
        check_device(self.device)

    def recorded(self) -> dict[str, Any]:
        """What recipe.json stores: every option that decides the result, as plain JSON values."""
        skipped = {
            "out",
            "overwrite",
            "device",
            "activation_memory",
            "checkpoint_seconds",
            "events",
        }
        values = dataclasses.asdict(self)
        plain = {k: v for k, v in values.items() if k not in skipped}
        plain["text"] = [str(path) for path in self.text]
        plain["targets"] = None if self.targets is None else list(self.targets)
        plain["tokens"] = self.num_tokens
        return {**plain, "preset_values": dataclasses.asdict(self.recipe)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """Options of `lillama export`."""

    model: Path
    out: Path
    format: ExportFormat = "dense"

    def __post_init__(self) -> None:
        check_choice("--format", self.format, get_args(ExportFormat))


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    """Options of `lillama generate`."""

    model: Path
    prompt: str
    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if not self.prompt:
            raise InputError("--prompt must not be empty")
        check_at_least("--max-new-tokens", self.max_new_tokens, 1)
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"--temperature must be a finite number >= 0, got {self.temperature}")
        check_device(self.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleConfig:
    """Options of `lillama sample`."""

    model: Path
    out: Path
    tokens: int = 2_000_000
    seq_len: int = 512
    temperature: float = 1.0
    # sequences written side by side
    batch_size: int = 64
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        check_at_least("--tokens", self.tokens, 1)
        check_at_least("--seq-len", self.seq_len, 2)
        check_at_least("--batch-size", self.batch_size, 1)
        if not 0 < self.temperature < math.inf:
            raise InputError(f"--temperature must be a finite number > 0, got {self.temperature}")
        check_device(self.device)

    def recorded(self) -> dict[str, Any]:
        """Plain JSON values of what decides the text."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in ("out", "device")}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig:
    """Options of `lillama report`."""

    out: Path
    events: Path | None = None
    eval: Path | None = None
    png: Path | None = None
    open: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneConfig:
    """Options of `lillama finetune`."""

    model: Path
    out: Path
    base: Path
    text: "tuple[Path | HubText, ...]"
    tokens: int = 2_000_000
    # further ones, which the base model writes
    own_tokens: int = 0
    seq_len: int = 512
    batch_size: int = 8
    packing: bool = True
    # how often every token is seen
    epochs: int = 1
    # of AdamW, at its peak; None: from the width and from how far the model is from its base
    learning_rate: float | None = None
    seed: int = 0
    device: str = "auto"
    overwrite: bool = False
    # how often the model is judged on held-out tokens
    evaluations: int = 8

    def __post_init__(self) -> None:
        if not self.text:
            raise InputError("finetune needs training text; give at least one --text FILE")
        check_at_least("--tokens", self.tokens, 1)
        check_at_least("--own-tokens", self.own_tokens, 0)
        check_at_least("--seq-len", self.seq_len, 2)
        check_at_least("--batch-size", self.batch_size, 1)
        check_at_least("--epochs", self.epochs, 1)
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise InputError(
                f"--learning-rate must be a finite number > 0, got {self.learning_rate}"
            )
        check_device(self.device)

    def recorded(self) -> dict[str, Any]:
        """Plain JSON values of what decides the result."""
        plain = {
            k: v
            for k, v in dataclasses.asdict(self).items()
            if k not in ("out", "device", "overwrite")
        }
        return plain | {"text": [str(path) for path in self.text]}


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Options of `lillama eval`."""

    model: Path
    text: "tuple[Path | HubText, ...]" = ()
    against: Path | None = None
    # what perplexity means: docs/evaluation.md
    metric: Metric = "blocks"
    # None: see `window`
    seq_len: int | None = None
    batch_size: int = 8
    # of lm-evaluation-harness, by name; a folder or a file of further ones; rows of each at most
    tasks: tuple[str, ...] = ()
    task_path: Path | None = None
    limit: int | None = None
    # prompts of the text to continue, greedily and sampled; 0: none
    generations: int = 0
    speed: bool = False
    dtype: Dtype = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        if not self.text and not self.tasks:
            raise InputError("eval needs text or tasks; give at least one --text FILE, or --tasks")
        check_choice("--metric", self.metric, get_args(Metric))
        if self.metric != "blocks" and not all(isinstance(text, Path) for text in self.text):
            raise InputError(
                f"--metric {self.metric} reads files, not datasets of the Hub; give a local file"
            )
        for name, minimum in (("seq_len", 2), ("batch_size", 1), ("limit", 1), ("generations", 0)):
            if (value := getattr(self, name)) is not None:
                check_at_least("--" + name.replace("_", "-"), value, minimum)
        if not self.text:
            given = {
                "--metric": self.metric != "blocks",
                "--seq-len": self.seq_len is not None,
                "--generations": self.generations > 0,
                "--speed": self.speed,
            }
            if unused := [name for name, is_given in given.items() if is_given]:
                raise InputError(f"{unused[0]} is about text; give at least one --text FILE")
        if not self.tasks:
            given = {"--task-path": self.task_path is not None, "--limit": self.limit is not None}
            if unused := [name for name, is_given in given.items() if is_given]:
                raise InputError(f"{unused[0]} is about tasks; name them with --tasks")
        check_choice("--dtype", self.dtype, DTYPES)
        check_device(self.device)

    @property
    def window(self) -> int | None:
        """Tokens of a block, or of a window of words; None: what the model has."""
        return EVAL_SEQ_LEN[self.metric] if self.seq_len is None else self.seq_len


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Options of `lillama serve`."""

    model: Path
    host: str = "127.0.0.1"
    # 0: one that is free
    port: int = 8000
    device: str = "auto"
    dtype: Dtype = "auto"
    # requests computed together, and those that may wait for a place
    max_batch: int = 8
    max_queue: int = 64
    # tokens of prompt and output together; None: what the model allows
    max_length: int | None = None
    # None: the name of the model's folder
    served_name: str | None = None
    # one key a line; None: everybody may ask
    api_key_file: Path | None = None
    # from a request's arrival to the end of its answer
    request_timeout_s: float = 600.0
    # how long a client may take to send a header, to send a body, to take in what it was sent, and
    # to send the next request on a connection
    client_timeout_s: float = 20.0
    # how long requests that were accepted may go on after SIGTERM
    drain_s: float = 30.0
    max_body_bytes: int = 2 * 2**20
    # a process may have 1,024 files open unless told otherwise
    max_connections: int = 512
    # prompts times n of one HTTP request
    max_choices: int = 16

    def __post_init__(self) -> None:
        if not self.host:
            raise InputError("--host must not be empty; 127.0.0.1 is this machine alone")
        if not 0 <= self.port <= 65535:
            raise InputError(f"--port must lie between 0 and 65535, got {self.port}")
        if self.served_name == "":
            raise InputError("--served-name must not be empty")
        check_device(self.device)
        check_choice("--dtype", self.dtype, DTYPES)
        for name in ("max_batch", "max_queue", "max_body_bytes", "max_connections", "max_choices"):
            check_at_least("--" + name.replace("_", "-"), getattr(self, name), 1)
        if self.max_length is not None:
            check_at_least("--max-length", self.max_length, 2)
        for name in ("request_timeout_s", "client_timeout_s", "drain_s"):
            value = getattr(self, name)
            if not (0 < value < math.inf or (name == "drain_s" and value == 0)):
                raise InputError(
                    f"--{name.replace('_', '-')} must be a finite number of seconds > 0, "
                    f"got {value}"
                )
