"""Models on slots, as the engine runs them: prompts into slots, one token of every slot a step."""

from lillama.serve.models.attention import MODEL_TYPES, AttentionRunner
from lillama.serve.models.mamba import MambaRunner
from lillama.serve.models.runner import Runner

__all__ = ["MODEL_TYPES", "AttentionRunner", "MambaRunner", "Runner"]
