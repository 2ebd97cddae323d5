"""What a model is still worth: perplexity, tasks, what it writes, how fast."""

from lillama.evaluate.evaluate import evaluate

__all__ = ["evaluate"]
