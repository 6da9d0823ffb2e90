"""Loads the plugins in schedulers that are Ray actors, which do not load them by themselves."""

from __future__ import annotations

import inspect
import operator
import sys
from typing import Any

from . import process
from .symbols import Function, MissingError, look_up

_ACTOR = "ray.engine:_create_scheduler_actor"


class _PluginsFirst:
    """A wrapper that unpickles to its value, after loading SGLang's plugins in that process.

    The pickle contains nothing of pystage, so that an actor also starts where pystage is not
    installed.
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def __reduce__(self) -> tuple[Function, tuple[Any, ...]]:
        return operator.getitem, ([_Load(), self.value], 1)


class _Load:
    def __reduce__(self) -> tuple[Function, tuple[Any, ...]]:
        from sglang.srt.plugins import load_plugins

        return load_plugins, ()


def create_scheduler_actor(original: Function, *args: Any, **kwargs: Any) -> Any:
    """Makes the actor load the plugins when it unpickles the server's arguments."""
    call = inspect.signature(original).bind(*args, **kwargs)
    call.arguments["server_args"] = _PluginsFirst(call.arguments["server_args"])
    return original(*call.args, **call.kwargs)


def configure_logger(original: Function, *args: Any, **kwargs: Any) -> Any:
    result = original(*args, **kwargs)
    process.state.say()
    if "sglang.srt.ray.engine" in sys.modules:
        _load_in_ray_actors()
    return result


def _load_in_ray_actors() -> None:
    """Hooks the creation of actors. Call it in the process that creates them, after SGLang's code
    for Ray has been imported."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target = f"sglang.srt.{_ACTOR.replace(':', '.')}"
    if target in HookRegistry._patched:
        return
    if why := cannot_load_in_ray_actors():
        process.once(
            "pystage is off in Ray's schedulers: %s; let all processes of Ray load SGLang's "
            "plugins: ray.init(runtime_env={'worker_process_setup_hook': "
            "'sglang.srt.plugins.load_plugins'})",
            why,
        )
        return
    HookRegistry.register(target, create_scheduler_actor, HookType.AROUND)
    HookRegistry.apply_hooks()


def cannot_load_in_ray_actors() -> str:
    """Why Ray actors cannot load the plugins; empty if they can."""
    try:
        function = look_up(_ACTOR, ())
    except MissingError as error:
        return str(error)
    takes = inspect.signature(function).parameters
    return "" if "server_args" in takes else f"{_ACTOR} takes no server_args"
