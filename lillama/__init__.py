"""Lillama makes trained language models smaller.

    lillama.compress(MODEL, OUT, reduction=0.2, text="calibration.txt")
    lillama.plan(MODEL, 0.2)
    lillama.eval(OUT, "held_out.txt", against=MODEL)
    lillama.finetune(OUT, BETTER, base=MODEL, text="calibration.txt")
    lillama.generate(OUT, "Once upon")
    lillama.export(OUT, DENSE, format="dense")
    lillama.report(OUT)
    lillama.sample(MODEL, "own.jsonl")
    with lillama.kernels_impl("reference"): ...

Importing this package loads neither torch nor transformers: each function brings what it needs when
it is first asked for. As soon as transformers can load a model it knows the checkpoint format too,
so that `AutoModelForCausalLM.from_pretrained(OUT)` works.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lillama.errors import InputError, LillamaError, RunError
from lillama.integrations.registration import announce
from lillama.version import __version__

if TYPE_CHECKING:
    from lillama_kernels import kernels_impl

    from lillama.checkpoint.export import export
    from lillama.compress.pipeline import compress
    from lillama.compress.plan.document import plan
    from lillama.compress.train.finetune import finetune
    from lillama.data.sample import sample
    from lillama.evaluate.evaluate import evaluate as eval
    from lillama.report.page import report
    from lillama.serve.generate import generate

__all__ = [
    "InputError",
    "LillamaError",
    "RunError",
    "__version__",
    "compress",
    "eval",
    "export",
    "finetune",
    "generate",
    "kernels_impl",
    "plan",
    "report",
    "sample",
]

# {public name: (module, its name there)}
_FUNCTIONS = {
    "compress": ("lillama.compress.pipeline", "compress"),
    "eval": ("lillama.evaluate.evaluate", "evaluate"),
    "export": ("lillama.checkpoint.export", "export"),
    "finetune": ("lillama.compress.train.finetune", "finetune"),
    "generate": ("lillama.serve.generate", "generate"),
    "kernels_impl": ("lillama_kernels", "kernels_impl"),
    "plan": ("lillama.compress.plan.document", "plan"),
    "report": ("lillama.report.page", "report"),
    "sample": ("lillama.data.sample", "sample"),
}


class _Package(ModuleType):
    """This module's class: finds a function when it is first asked for, and does not let importing
    a subpackage put that in the place of the function of its name."""

    def __getattr__(self, name: str) -> Any:
        if name not in _FUNCTIONS:
            raise AttributeError(f"module 'lillama' has no attribute {name!r}")
        module, called = _FUNCTIONS[name]
        found = getattr(import_module(module), called)
        setattr(self, name, found)
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _FUNCTIONS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_FUNCTIONS})


sys.modules[__name__].__class__ = _Package
announce()
