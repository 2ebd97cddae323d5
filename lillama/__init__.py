"""Lillama: low-rank compression of trained language models.

    lillama.compress(MODEL, OUT, reduction=0.2, text="calibration.txt")
    lillama.plan(MODEL, 0.2)
    lillama.advise(MODEL, text="calibration.txt")
    lillama.eval(OUT, "held_out.txt", against=MODEL)
    lillama.finetune(OUT, BETTER, base=MODEL, text="calibration.txt")
    lillama.generate(OUT, "Once upon")
    lillama.export(OUT, DENSE, format="dense")
    lillama.report(OUT)
    lillama.import_upstream(FOLDER, OUT, base=MODEL)
    lillama.sample(MODEL, "own.jsonl")
    with lillama.kernels_impl("reference"): ...

Importing this package registers the checkpoint format with transformers, so that
`AutoModelForCausalLM.from_pretrained(OUT)` works.
"""

from lillama_kernels import kernels_impl

from lillama.compress.advise import advise
from lillama.compress.finetune import finetune
from lillama.compress.pipeline import compress
from lillama.compress.plan import plan
from lillama.errors import InputError, LillamaError, RunError
from lillama.evaluate import evaluate as eval
from lillama.export import export
from lillama.integrations.transformers import register as _register
from lillama.report import report
from lillama.sample import sample
from lillama.serve.generate import generate
from lillama.upstream import import_upstream
from lillama.version import __version__

__all__ = [
    "InputError",
    "LillamaError",
    "RunError",
    "__version__",
    "advise",
    "compress",
    "eval",
    "export",
    "finetune",
    "generate",
    "import_upstream",
    "kernels_impl",
    "plan",
    "report",
    "sample",
]

_register()
