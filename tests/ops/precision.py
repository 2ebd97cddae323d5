"""In which dtypes and sizes the tests of operations run: fp32 always, 16 bits where a test is about
them, the rest in `make test-all`."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

full = pytest.mark.full
each_dtype = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="fp32"),
        pytest.param(torch.float16, id="fp16", marks=full),
        pytest.param(torch.bfloat16, id="bf16", marks=full),
    ],
)
each_half = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


def some(
    name: str, always: Iterable[Any], more: Iterable[Any], ids: Callable[[Any], str] = str
) -> pytest.MarkDecorator:
    """Parametrise with `always`, and with `more` in `make test-all`."""
    values = [pytest.param(value, id=ids(value)) for value in always]
    values += [pytest.param(value, id=ids(value), marks=full) for value in more]
    return pytest.mark.parametrize(name, values)
