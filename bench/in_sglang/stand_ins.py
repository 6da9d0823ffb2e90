"""Provides stubs for packages that are not installed, which on most machines are kernels. The stubs
can be imported, but calling anything in them raises. So nothing can pass because of a fake."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

KERNELS = ("sgl_kernel", "vllm", "torchvision", "flashinfer", "deep_gemm")
CUDA_KERNELS = ("sgl_kernel", "vllm", "torchvision")  # SGLang itself checks for the others there
STOOD_IN: list[str] = []  # the packages with stubs in this process


class StandIn:
    """Any attribute of a module that is not installed."""

    def __init__(self, name: str) -> None:
        self.__name__ = self.__qualname__ = name

    def __getattr__(self, name: str) -> StandIn:
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(f"{self.__name__}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{self.__name__} was called, but its package is not installed here")

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (object,)

    # Operations that annotations need: `X | None`, `X[int]`, a field of a pydantic model.

    def __or__(self, other: Any) -> Any:
        return self

    __ror__ = __or__

    def __getitem__(self, item: Any) -> Any:
        return self

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.any_schema()


class _Module(ModuleType):
    __path__: Sequence[str] = ()
    __version__ = "0"

    def __getattr__(self, name: str) -> StandIn:
        if name.startswith("__"):
            raise AttributeError(name)
        value = StandIn(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, packages: Iterable[str]) -> None:
        self.packages = frozenset(packages)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        inside = any(f"{name}.".startswith(f"{package}.") for package in self.packages)
        if inside or any(package.startswith(f"{name}.") for package in self.packages):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        return None


def stand_in(packages: Sequence[str] = KERNELS) -> list[str]:
    """Provides stubs for those of ``packages`` that are not installed or are broken. Returns their
    names. After a stub for ``a.b``, only the module ``b`` of the package ``a`` can be imported."""
    missing = [name for name in packages if not _imports(name)]
    sys.meta_path.insert(0, _Finder(missing))
    STOOD_IN.extend(missing)
    return missing


def _imports(name: str) -> bool:
    try:
        if importlib.util.find_spec(name) is None:
            return False
    except ModuleNotFoundError:  # its parent package is missing too
        return False
    if name != "torchvision":  # a build for another torch is found but fails on import
        return True
    try:
        importlib.import_module(name)
    except Exception:
        for module in [m for m in sys.modules if m.partition(".")[0] == name]:
            del sys.modules[module]
        return False
    return True
