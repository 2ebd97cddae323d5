"""Call a function once another library's module has been imported, and no earlier."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

__all__ = ["when_imported"]


class _Then(Loader):
    """The module's own loader, and the call behind it."""

    def __init__(self, loader: Loader, module: str, function: str) -> None:
        self.loader, self.module, self.function = loader, module, function

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        ours = import_module(self.module)
        # half imported where it is what imports the watched module: it then calls this at its end
        if hasattr(ours, self.function):
            getattr(ours, self.function)()


class _Watch(MetaPathFinder):
    """Finds nothing but one module, once."""

    def __init__(self, watched: str, module: str, function: str) -> None:
        self.watched, self.call = watched, (module, function)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.watched:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, *self.call)
        return spec


def when_imported(watched: str, module: str, function: str) -> None:
    """Call `module.function()` as soon as the module `watched` is there: now or when it is first
    imported. `module` is not imported before."""
    if watched in sys.modules:
        getattr(import_module(module), function)()
    else:
        sys.meta_path.insert(0, _Watch(watched, module, function))
