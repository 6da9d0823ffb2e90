"""Looks up SGLang's symbols, and finds what runs when one is called."""

from __future__ import annotations

import inspect
import logging
import pkgutil
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

logger = logging.getLogger("pystage.sglang")

Function: TypeAlias = Callable[..., Any]


class Hook(NamedTuple):
    """A symbol and the function that wraps it.

    Attributes:
        part: the part of the plugin that the hook belongs to.
        target: ``module:symbol``, with the module relative to ``sglang.srt``.
        takes: the required names of the symbol's first parameters.
        function: the wrapper, called as ``function(original, *args, **kwargs)``.
    """

    part: str
    target: str
    takes: tuple[str, ...]
    function: Function


class MissingError(LookupError):
    """A symbol does not exist, or takes other parameters than the hook expects."""


def look_up(target: str, takes: tuple[str, ...]) -> Any:
    """The symbol's current function.

    Raises:
        MissingError: the symbol does not exist, or its first parameters are not ``takes``.
    """
    try:
        function = inspect.getattr_static(*owner_and_name(target))
    except AttributeError as error:
        raise MissingError(f"no {target} ({error})") from error
    except Exception as error:  # importing SGLang's modules runs arbitrary code
        raise MissingError(f"no {target} ({type(error).__name__}: {error})") from error
    function = getattr(function, "__func__", function)
    found = tuple(inspect.signature(function).parameters)[: len(takes)]
    if found != takes:
        raise MissingError(f"{target} takes ({', '.join(found)}), not ({', '.join(takes)})")
    return function


def owner_and_name(target: str) -> tuple[Any, str]:
    module, _, symbol = target.partition(":")
    owner, _, name = symbol.rpartition(".")
    return pkgutil.resolve_name(f"sglang.srt.{module}:{owner}"), name


def is_there(hook: Hook) -> bool:
    try:
        look_up(hook.target, hook.takes)
    except MissingError as error:
        logger.debug("pystage: not hooked: %s", error)
        return False
    return True


def first_there(targets: tuple[str, ...]) -> str:
    """The first of the symbols that exists. Raises MissingError if none does."""
    for target in targets[:-1]:
        try:
            look_up(target, ())
        except MissingError:
            continue
        return target
    look_up(targets[-1], ())
    return targets[-1]


def current(target: str) -> Any:
    """The function that runs when the symbol is called."""
    function = inspect.getattr_static(*owner_and_name(target))
    return getattr(function, "__func__", function)


def layers_of(function: Any) -> list[Any]:
    """The function, the function that it wraps, the one that this wraps, and so on."""
    chain = [function]
    while hasattr(chain[-1], "__wrapped__"):
        chain.append(chain[-1].__wrapped__)
    return chain


def is_reached(hook: Hook) -> str:
    """Why calls of the symbol do not reach the hook; empty if they do."""
    chain = layers_of(current(hook.target))
    if not any(value is hook.function for f in chain for value in _closed_over(f)):
        return f"{hook.target} is not hooked"
    for name, module in _modules_of_sglang():
        if any(value is old for value in list(vars(module).values()) for old in chain[1:]):
            return f"{name} still has the original of {hook.target}"
    return ""


def is_shared(hook: Hook) -> str:
    """Why a call of the symbol runs other code than the hook and SGLang's own function; empty if it
    does not. Such other code would receive the hook's results, or the hook would skip it."""
    outer, *inner = layers_of(current(hook.target))
    if not any(value is hook.function for value in _closed_over(outer)):
        return f"another plugin hooks {hook.target}"
    for function in inner:
        where = getattr(function, "__globals__", {}).get("__name__", "")
        if not where.startswith("sglang.") or where == "sglang.srt.plugins.hook_registry":
            return f"another plugin hooks {hook.target}"
    owner, name = owner_and_name(hook.target)
    if not isinstance(owner, type):
        for where, module in _modules_of_sglang():
            if vars(module).get(name, outer) is not outer:
                return f"{where} has another {name}"
    return ""


def _modules_of_sglang() -> list[tuple[str, Any]]:
    return [(n, m) for n, m in list(sys.modules.items()) if n.startswith("sglang.") and m]


def _closed_over(function: Any) -> list[Any]:
    """The closure of a wrapper that SGLang's registry made. It contains the hook."""
    return (
        list(inspect.getclosurevars(function).nonlocals.values())
        if hasattr(function, "__closure__")
        else []
    )
