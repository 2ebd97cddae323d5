"""Factorised modules, and their exchange for the dense ones by name."""

from lillama.modules.low_rank_experts import LowRankExperts
from lillama.modules.low_rank_linear import LowRankLinear
from lillama.modules.replace import replace_modules

__all__ = ["LowRankExperts", "LowRankLinear", "replace_modules"]
