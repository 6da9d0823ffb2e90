"""Stands in for packages that are not installed: kernels, on most machines. They can be imported,
and calling anything in them raises. So nothing passes on a fake."""

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
CUDA_KERNELS = ("sgl_kernel", "vllm", "torchvision")  # SGLang looks itself for the others there
STOOD_IN: list[str] = []  # in this process


class StandIn:
    """Any attribute of a module that is not there."""

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

    # What annotations ask of a class: `X | None`, `X[int]`, a field of a pydantic model.

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
    """Stands in for those of ``packages`` that are not installed, or broken; returns which. For
    ``a.b``, of the package ``a`` only the module ``b`` can be imported then."""
    missing = [name for name in packages if not _imports(name)]
    sys.meta_path.insert(0, _Finder(missing))
    STOOD_IN.extend(missing)
    return missing


def _imports(name: str) -> bool:
    try:
        if importlib.util.find_spec(name) is None:
            return False
    except ModuleNotFoundError:  # not even its parent
        return False
    if name != "torchvision":  # a build for another torch is found, and fails when imported
        return True
    try:
        importlib.import_module(name)
    except Exception:
        for module in [m for m in sys.modules if m.partition(".")[0] == name]:
            del sys.modules[module]
        return False
    return True
