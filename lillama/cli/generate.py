"""`lillama generate`: its options and the call."""

from typing import Annotated

import typer

from lillama.cli.options import DeviceOption, Model, Revision, at_revision, defaults
from lillama.config import GenerateConfig

__all__ = ["generate"]

_DEFAULTS = defaults(GenerateConfig)


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.", show_default=False)],
    revision: Revision = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = _DEFAULTS[
        "max_new_tokens"
    ],
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = _DEFAULTS["temperature"],
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = _DEFAULTS["seed"],
    device: DeviceOption = _DEFAULTS["device"],
) -> None:
    """Continue a prompt."""
    from lillama.serve.generate import generate as run

    text = run(
        at_revision(model, revision),
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        device=device,
    )
    print(prompt + text, flush=True)
