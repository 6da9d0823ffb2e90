"""The entry point, and the plugin's status for ``python -m pystage doctor``."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from typing import Any

from . import process, sizer
from .hooks import history_hook, needed_symbols, optional
from .known_code import OtherCodeError
from .ray_actors import cannot_load_in_ray_actors
from .settings import ENVIRONMENT, Settings
from .symbols import MissingError, is_there
from .verification import verify

logger = logging.getLogger("pystage.sglang")


def plugin() -> None:
    """The entry point. It registers the hooks, and verifies them after SGLang has applied them."""
    process.state.loaded = True
    try:
        process.state.settings = Settings.from_environment()
    except ValueError as error:
        return _stay_off(str(error), logging.ERROR)
    if not process.state.settings.enabled:
        return _stay_off(f"{ENVIRONMENT['enabled']}=0", logging.INFO)
    try:
        hooks = needed_symbols()
        try:
            hooks.append(history_hook())
        except OtherCodeError as error:
            process.state.no_history = str(error)
    except MissingError as error:
        return _stay_off(
            f"this SGLang is not as expected: {error}; the server runs as without pystage"
        )
    hooks += [hook for hook in optional(process.state.settings) if is_there(hook)]

    from sglang.srt.managers import overlap_utils
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    process.state.checks_relay = bool(getattr(overlap_utils, "_DEBUG_ASSERT", False))
    for hook in hooks:
        target = f"sglang.srt.{hook.target.replace(':', '.')}"
        HookRegistry.register(target, hook.function, HookType.AROUND)
    process.state.hooks, process.state.off = hooks, ""

    # SGLang applies hooks after all plugins have registered theirs. Applying them here would shut
    # out later plugins that hook the same symbols.
    as_it_was = vars(HookRegistry)["apply_hooks"]

    def apply_hooks(registry: type) -> None:
        HookRegistry.apply_hooks = as_it_was
        HookRegistry.apply_hooks()
        verify()

    HookRegistry.apply_hooks = classmethod(apply_hooks)
    return None


def _stay_off(reason: str, level: int = logging.WARNING) -> None:
    process.state.off = reason
    if level > logging.INFO:
        process.state.said = True
        logger.log(level, "%s", process.state)
    else:
        process.state.say()


def status() -> dict[str, Any]:
    """The plugin's state in this process, for ``python -m pystage doctor``."""
    try:
        version = metadata.version("sglang")
    except metadata.PackageNotFoundError:
        version = None
    return {
        "sglang": version,
        "off": process.state.off,
        "active": process.state.active,
        "broken": process.state.broken,
        "left": process.state.left,
        "counts": process.counts(),
        "settings": asdict(process.state.settings),
        "sizing": sizer.state(),
        "line": str(process.state),
    }


@contextmanager
def _nothing_on_stdout() -> Iterator[None]:
    """Sends output to stderr: imports may print, but stdout must have only the one JSON object."""
    out, sys.stdout = sys.stdout, sys.stderr
    try:
        yield
    finally:
        sys.stdout = out


def main() -> None:
    """Loads SGLang's plugins as a server process does, and prints the status as JSON."""
    with _nothing_on_stdout():
        from sglang.srt.plugins import load_plugins

        load_plugins()
    if not process.state.loaded:
        allowed = os.environ.get("SGLANG_PLUGINS")
        process.state.off = (
            f"SGLANG_PLUGINS is {allowed!r}" if allowed else "SGLang did not load it"
        )
    with _nothing_on_stdout():
        ray = cannot_load_in_ray_actors() if importlib.util.find_spec("ray") else ""
    print(json.dumps({**status(), "ray": ray}))
