"""Serving with vLLM: a plugin that vLLM finds by itself where lillama is installed beside it.

vLLM calls `register` in every process that it starts (entry point `vllm.general_plugins`). A
checkpoint with `"quant_method": "lillama"` then loads like any other; no option selects it. Written
for vLLM 0.32 and tested with it on CPUs only: not run on a GPU. docs/serving-vllm.md has the rest.
"""

import logging
from importlib import import_module

__all__ = ["TESTED", "register"]

TESTED = "0.32"

logger = logging.getLogger(__name__)


def register() -> None:
    """Tell vLLM about the format, the vocabulary's layers and Mamba's mixer. Safe to call twice.

    Raises:
        ImportError: vLLM is of a version whose classes are elsewhere. vLLM logs this and goes on
            without; a model of ours is then an unknown quantization method.
    """
    version = getattr(import_module("vllm"), "__version__", "unknown")
    tested = version.split(".")[:2] == TESTED.split(".")
    if not tested:
        logger.warning("lillama was tested with vLLM %s, this is %s", TESTED, version)
    try:
        for name in ("quantization", "layers"):
            import_module(f"lillama.integrations.vllm.{name}")
    except ImportError as error:
        if tested:
            raise
        raise ImportError(
            f"lillama cannot be used with vLLM {version}, only with {TESTED}: {error}"
        ) from error
