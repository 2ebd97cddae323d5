"""The sentinel: one mis-shaped tensor under a dense name, so that a load without lillama fails
instead of serving random weights. `config.json` names it."""

from collections.abc import Iterable, Mapping

from lillama.errors import InputError
from lillama.models.families import Family

__all__ = ["check_sentinel", "saved_sentinel", "sentinel"]


def _first(family: Family, ranks: Iterable[str]) -> str:
    """Return the matrix that the sentinel is named after, whatever the order of the ranks; the head
    only where there is no other: a model without its head does not load that."""
    return min(ranks, key=lambda name: (name == family.head, name))


def sentinel(family: Family, ranks: Mapping[str, int]) -> tuple[str, tuple[int, ...]]:
    """Return name and shape of the mis-shaped tensor that makes a load without lillama raise."""
    first = _first(family, ranks)
    parsed = None if family.experts is None else family.experts.parse(first)
    if parsed is None:
        return f"{first}.weight", (1,)
    return f"{parsed[0]}.down_proj", (1, 1, 1)


def saved_sentinel(family: Family, ranks: Mapping[str, int]) -> tuple[str, tuple[int, ...]]:
    """As `sentinel`, under a name that save_pretrained of transformers leaves as it is; it renames
    what it knows by its name in the model, as experts."""
    first = _first(family, ranks)
    if family.experts is None or family.experts.parse(first) is None:
        return sentinel(family, ranks)
    return f"{first.rpartition('.')[0]}.{family.experts.down}.weight", (1, 1)


def check_sentinel(name: object) -> None:
    """Raise InputError unless `name` can be a tensor's."""
    if not isinstance(name, str) or not name:
        raise InputError(
            f"quantization_config must name the sentinel, got {name!r}; compress again, or use the "
            "config.json that was written with the checkpoint"
        )
