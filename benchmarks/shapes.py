"""Shapes that the benchmarks run, each with its source.

Tiny ones are those of the teachers in examples/teachers and run on a CPU in milliseconds; large
ones are those of published models, from one row (decoding) to 16384 (prefill).
"""

from dataclasses import dataclass

__all__ = [
    "EXPERTS",
    "LINEARS",
    "LOSSES",
    "MAMBA_BLOCKS",
    "SCANS",
    "SHARED_LINEARS",
    "ExpertsShape",
    "LinearShape",
    "LossShape",
    "MambaBlockShape",
    "ScanShape",
    "Shape",
    "SharedLinearsShape",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """name: the benchmark's id. needs_gpu: too large for a CPU. full: only run with --full."""

    name: str
    needs_gpu: bool = True
    full: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearShape(Shape):
    """compiled: torch.compile's best is timed too, which takes 10 s and more. train: forward and
    backward are timed together without --full too."""

    rows: int
    in_features: int
    out_features: int
    rank: int
    bias: bool = False
    compiled: bool = False
    train: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedLinearsShape(Shape):
    """Layers with one input; rank of each."""

    rows: int
    in_features: int
    out_features: tuple[int, ...]
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsShape(Shape):
    """skewed: half of the (token, place) pairs name one expert, and the others share the rest
    unevenly. train: forward and backward are timed together without --full too."""

    rows: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    rank: int
    skewed: bool = False
    train: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LossShape(Shape):
    rows: int
    hidden_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanShape(Shape):
    """min_speedup: over transformers' eager scan, below which the benchmark fails on a CPU."""

    batch: int
    channels: int
    state_size: int
    steps: int
    min_speedup: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MambaBlockShape(Shape):
    """ranks: of in_proj and out_proj."""

    batch: int = 1
    steps: int
    hidden_size: int
    state_size: int
    time_step_rank: int
    ranks: tuple[int, int]


# Mixtral-8x7B: mistralai/Mixtral-8x7B-v0.1 config.json
MIXTRAL_8X7B_HIDDEN = 4096
MIXTRAL_8X7B_INTERMEDIATE = 14336
MIXTRAL_8X7B_EXPERTS = 8
MIXTRAL_8X7B_TOP_K = 2
# Mamba-2.8B: state-spaces/mamba-2.8b-hf config.json
MAMBA_2_8B_HIDDEN = 2560
MAMBA_2_8B_INTERMEDIATE = 5120
MAMBA_2_8B_STATE = 16
MAMBA_2_8B_TIME_STEP_RANK = 160
# Phi-2: microsoft/phi-2 config.json
PHI_2_HIDDEN = 2560
PHI_2_INTERMEDIATE = 10240
# Llama-3-8B: meta-llama/Meta-Llama-3-8B config.json; keys and values have 1024 features
LLAMA_3_8B_HIDDEN = 4096
# the teachers of this repository: examples/teachers/*/config.json
TINY_HIDDEN = 128
TINY_MIXTRAL_INTERMEDIATE = 192
TINY_MIXTRAL_EXPERTS = 8
TINY_MAMBA_INTERMEDIATE = 256
TINY_MAMBA_STATE = 16

# Layers as (K, N, bias). Llama-3-8B's gate and up have the shape of Mixtral's w1 and w3.
LAYERS = {
    "mixtral-8x7b-w1": (MIXTRAL_8X7B_HIDDEN, MIXTRAL_8X7B_INTERMEDIATE, False),
    "mixtral-8x7b-w2": (MIXTRAL_8X7B_INTERMEDIATE, MIXTRAL_8X7B_HIDDEN, False),
    "mamba-2.8b-in_proj": (MAMBA_2_8B_HIDDEN, 2 * MAMBA_2_8B_INTERMEDIATE, False),
    "mamba-2.8b-out_proj": (MAMBA_2_8B_INTERMEDIATE, MAMBA_2_8B_HIDDEN, False),
    "phi-2-fc1": (PHI_2_HIDDEN, PHI_2_INTERMEDIATE, True),
    "phi-2-qkvo": (PHI_2_HIDDEN, PHI_2_HIDDEN, True),
    "llama-3-8b-o_proj": (LLAMA_3_8B_HIDDEN, LLAMA_3_8B_HIDDEN, False),
}
RANKS = (512, 1024, 1536, 2048, 3072)
ROWS = (1, 4, 16, 64, 256, 1024, 2048, 4096, 16384)
# What runs without --full; the rows that the targets speak of come first, in case time runs out
STANDARD = {
    ("mixtral-8x7b-w1", 1024): ROWS,
    ("mixtral-8x7b-w1", 2048): (1, 4, 16, 64, 2048, 4096),
    ("mamba-2.8b-in_proj", 1024): (1, 4, 16, 64, 2048, 4096),
    ("phi-2-fc1", 1024): (1, 4, 16, 64, 2048, 4096),
    ("mixtral-8x7b-w2", 1024): (1, 4, 16, 4096),
    ("mamba-2.8b-out_proj", 1024): (1, 4, 16, 4096),
    ("phi-2-qkvo", 1024): (1, 4, 16, 4096),
    ("llama-3-8b-o_proj", 1024): (1, 16, 4096),
    ("mixtral-8x7b-w2", 2048): (1, 4, 16),
    ("mixtral-8x7b-w1", 3072): (1, 16, 4096),
    ("mixtral-8x7b-w1", 1536): (1, 16),
    ("mixtral-8x7b-w1", 512): (1, 16),
    ("mamba-2.8b-in_proj", 512): (1, 16),
    ("phi-2-qkvo", 512): (1, 16),
}
COMPILED = tuple(STANDARD)[:4]
COMPILED_ROWS = (1, 16, 64, 2048, 4096)
TRAINED = {("mixtral-8x7b-w1", 1024): (256, 4096), ("mamba-2.8b-in_proj", 1024): (4096,)}


def _linear(layer: str, rank: int, rows: int) -> LinearShape:
    k, n, bias = LAYERS[layer]
    return LinearShape(
        name=f"{layer}-R{rank}-M{rows}",
        full=rows not in STANDARD.get((layer, rank), ()),
        rows=rows,
        in_features=k,
        out_features=n,
        rank=rank,
        bias=bias,
        compiled=(layer, rank) in COMPILED and rows in COMPILED_ROWS,
        train=rows in TRAINED.get((layer, rank), ()),
    )


# Every rank below the one at which two factors are as large as the matrix
_PAIRS = [
    (layer, rank) for layer, (k, n, _) in LAYERS.items() for rank in RANKS if rank < k * n / (k + n)
]
LINEARS = [
    *(
        LinearShape(
            name=f"tiny-mamba-in_proj-M{rows}",
            needs_gpu=False,
            rows=rows,
            in_features=TINY_HIDDEN,
            out_features=2 * TINY_MAMBA_INTERMEDIATE,
            rank=48,
            train=rows > 64,
        )
        for rows in (16, 2048)
    ),
    *(_linear(layer, rank, rows) for (layer, rank), some in STANDARD.items() for rows in some),
    *(
        shape
        for layer, rank in _PAIRS
        for rows in ROWS
        if (shape := _linear(layer, rank, rows)).full
    ),
]

SHARED_LINEARS = [
    SharedLinearsShape(
        name="tiny-qkv-M16",
        needs_gpu=False,
        rows=16,
        in_features=TINY_HIDDEN,
        out_features=(TINY_HIDDEN, TINY_HIDDEN // 2, TINY_HIDDEN // 2),
        rank=32,
    ),
    *(
        SharedLinearsShape(
            name=f"{name}-R{rank}-M{rows}", rows=rows, in_features=k, out_features=n, rank=rank
        )
        for name, k, n, rank in (
            ("llama-3-8b-qkv", LLAMA_3_8B_HIDDEN, (LLAMA_3_8B_HIDDEN, 1024, 1024), 512),
            ("mixtral-8x7b-w1-w3", MIXTRAL_8X7B_HIDDEN, (MIXTRAL_8X7B_INTERMEDIATE,) * 2, 1024),
        )
        for rows in (1, 4, 16, 64)
    ),
]

# By rank, the tokens that run without --full with even and with skewed routing
EXPERTS_ROWS = (1, 4, 16, 64, 512, 4096, 16384)
EXPERTS_STANDARD = {
    1024: (EXPERTS_ROWS, (16, 4096)),
    1536: ((1, 16, 4096), ()),
    2048: ((1, 16, 4096), ()),
}


def _mixtral(rank: int, rows: int, skewed: bool) -> ExpertsShape:
    return ExpertsShape(
        name=f"mixtral-8x7b-R{rank}-M{rows}{'-skewed' if skewed else ''}",
        full=rows not in EXPERTS_STANDARD[rank][skewed],
        rows=rows,
        hidden_size=MIXTRAL_8X7B_HIDDEN,
        intermediate_size=MIXTRAL_8X7B_INTERMEDIATE,
        num_experts=MIXTRAL_8X7B_EXPERTS,
        top_k=MIXTRAL_8X7B_TOP_K,
        rank=rank,
        skewed=skewed,
        train=(rank, rows, skewed) == (1024, 4096, False),
    )


_LAYERS = [
    _mixtral(rank, rows, skewed)
    for rank in EXPERTS_STANDARD
    for skewed in (False, True)
    for rows in EXPERTS_ROWS
]
EXPERTS = [
    ExpertsShape(
        name="tiny-mixtral-M1024",
        needs_gpu=False,
        rows=1024,
        hidden_size=TINY_HIDDEN,
        intermediate_size=TINY_MIXTRAL_INTERMEDIATE,
        num_experts=TINY_MIXTRAL_EXPERTS,
        top_k=2,
        rank=48,
        train=True,
    ),
    # those that run without --full first, in case time runs out
    *sorted(_LAYERS, key=lambda shape: shape.full),
]

LOSSES = [
    LossShape(name="tiny-M2048-H128", needs_gpu=False, rows=2048, hidden_size=TINY_HIDDEN),
    LossShape(name="mamba-2.8b-M8192", rows=8192, hidden_size=MAMBA_2_8B_HIDDEN),
    LossShape(name="mixtral-8x7b-M4096", rows=4096, hidden_size=MIXTRAL_8X7B_HIDDEN),
    LossShape(name="mixtral-8x7b-M16384", rows=16384, hidden_size=MIXTRAL_8X7B_HIDDEN),
]

# The second is the project's acceptance line: on a CPU, training a tiny Mamba (batches of 8, 256
# tokens, 384 channels) at least 20 times as fast as transformers' eager scan. The first, of the
# shipped teacher's width at batch 2, is quick to repeat.
SCANS = [
    ScanShape(
        name="tiny-mamba-B2-D256-T256",
        needs_gpu=False,
        batch=2,
        channels=TINY_MAMBA_INTERMEDIATE,
        state_size=TINY_MAMBA_STATE,
        steps=256,
    ),
    ScanShape(
        name="acceptance-B8-D384-T256",
        needs_gpu=False,
        batch=8,
        channels=384,
        state_size=TINY_MAMBA_STATE,
        steps=256,
        min_speedup=20.0,
    ),
    *(
        ScanShape(
            name=f"mamba-2.8b-B1-T{steps}",
            batch=1,
            channels=MAMBA_2_8B_INTERMEDIATE,
            state_size=MAMBA_2_8B_STATE,
            steps=steps,
        )
        for steps in (1024, 4096)
    ),
]

# One Mamba block, ranks as when half of in_proj and out_proj is kept; steps 1 is a decode step
MAMBA_BLOCKS = [
    MambaBlockShape(
        name=f"tiny-T{steps}",
        needs_gpu=False,
        steps=steps,
        hidden_size=TINY_HIDDEN,
        state_size=TINY_MAMBA_STATE,
        time_step_rank=8,
        ranks=(48, 40),
    )
    for steps in (1, 64)
]
MAMBA_BLOCKS += [
    MambaBlockShape(
        name=f"mamba-2.8b-B{batch}-T{steps}",
        batch=batch,
        steps=steps,
        hidden_size=MAMBA_2_8B_HIDDEN,
        state_size=MAMBA_2_8B_STATE,
        time_step_rank=MAMBA_2_8B_TIME_STEP_RANK,
        ranks=(1024, 848),
    )
    for batch, steps in ((1, 1), (16, 1), (1, 4096))
]
