"""Tell transformers of our checkpoint format without importing it, or us, before it is needed.

`announce` waits until transformers' registry of quantizers is imported and enters stand-ins there;
the first checkpoint in our format imports `lillama.integrations.transformers`, whose classes take
their place.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

__all__ = ["announce"]

REGISTRY = "transformers.quantizers.auto"


class _Config:
    """Stands in for `LillamaConfig`."""

    @staticmethod
    def from_dict(values: dict[str, Any], **options: Any) -> Any:
        from lillama.integrations.transformers import LillamaConfig, register

        register()
        return LillamaConfig.from_dict(values, **options)


def _quantizer(config: Any, **options: Any) -> Any:
    """Stands in for `LillamaQuantizer`."""
    from lillama.integrations.transformers import LillamaQuantizer, register

    register()
    return LillamaQuantizer(config, **options)


def _enter(registry: Any) -> None:
    registry.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault("lillama", _Config)
    registry.AUTO_QUANTIZER_MAPPING.setdefault("lillama", _quantizer)


class _Then(Loader):
    """The registry's own loader, and the entry behind it."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _enter(module)


class _Watch(MetaPathFinder):
    """Finds nothing but the registry, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


def announce() -> None:
    """Enter the stand-ins: now, or when the registry is imported."""
    if REGISTRY in sys.modules:
        _enter(sys.modules[REGISTRY])
    else:
        sys.meta_path.insert(0, _Watch())
