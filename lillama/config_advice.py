"""Options of the advice: `lillama plan --advise`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lillama.config import Gauge, PlanConfig, check_choice, check_device
from lillama.errors import InputError

__all__ = ["ADVISED_PRESETS", "AdviceConfig", "AdvisedPreset"]

# Those whose ranks the loss chooses, cheapest first: of the others no quality is predicted.
AdvisedPreset = Literal["fast", "default"]
ADVISED_PRESETS: tuple[AdvisedPreset, ...] = ("fast", "default")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdviceConfig:
    """Options of `lillama plan --advise`. Most are those of the run that it advises on."""

    model: Path
    # calibration text; without any no quality is predicted
    text: tuple[Path, ...] = ()
    # None: the largest that is expected to keep `retain`
    reduction: float | None = None
    # None: the cheapest that is expected to keep `retain`
    preset: AdvisedPreset | None = None
    # base perplexity / perplexity, as `retained` of eval
    retain: float = 0.95
    targets: tuple[str, ...] | None = None
    gauge: Gauge | None = None
    # None: the preset's
    tokens: int | None = None
    seq_len: int = 512
    activation_memory: int = 4 * 2**30
    device: str = "auto"
    # a preset expected to take longer is not advised unless it is asked for
    max_hours: float = 24.0

    def __post_init__(self) -> None:
        check_choice("--preset with --advise", self.preset, ADVISED_PRESETS, optional=True)
        if not 0 < self.retain < 1:
            raise InputError(
                "--retain must lie between 0 and 1, both excluded (base perplexity divided by "
                f"perplexity), got {self.retain}"
            )
        if not 0 < self.max_hours < math.inf:
            raise InputError(f"max_hours must be a finite number > 0, got {self.max_hours}")
        check_device(self.device)
        self.run_options("default")  # checks the others

    def run_options(self, preset: AdvisedPreset, reduction: float | None = None) -> PlanConfig:
        """Of the run that is thought of; without any reduction of a small one."""
        return PlanConfig(
            model=self.model,
            reduction=reduction or self.reduction or 0.05,
            preset=preset,
            targets=self.targets,
            gauge=self.gauge,
            tokens=self.tokens,
            seq_len=self.seq_len,
            activation_memory=self.activation_memory,
        )
