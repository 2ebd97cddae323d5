"""Lillama: low-rank compression of trained language models.

    lillama.compress(MODEL, OUT, reduction=0.2, text="calibration.txt")
    lillama.plan(MODEL, 0.2)
    lillama.eval(OUT, "held_out.txt", against=MODEL)
    lillama.finetune(OUT, BETTER, base=MODEL, text="calibration.txt")
    lillama.generate(OUT, "Once upon")
    lillama.export(OUT, DENSE, format="dense")
    lillama.report(OUT)
    lillama.sample(MODEL, "own.jsonl")
    with lillama.kernels_impl("reference"): ...

Importing this package registers the checkpoint format with transformers, so that
`AutoModelForCausalLM.from_pretrained(OUT)` works.
"""

from lillama_kernels import kernels_impl

from lillama.checkpoint.export import export
from lillama.compress.pipeline import compress
from lillama.compress.plan.plan import plan
from lillama.compress.train.finetune import finetune
from lillama.data.sample import sample
from lillama.errors import InputError, LillamaError, RunError
from lillama.evaluate import evaluate as eval
from lillama.generate import generate
from lillama.integrations.transformers import register as _register
from lillama.report import report
from lillama.version import __version__

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

_register()
