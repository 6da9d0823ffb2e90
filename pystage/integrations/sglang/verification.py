"""Checks that calls reach the hooks, and decides what is left to SGLang's own code."""

from __future__ import annotations

import logging

from . import process
from .known_code import (
    ALLOCATE,
    BUILD,
    PREPARE,
    RESOLVE,
    SAMPLING,
    WRITE_ROWS,
    release_of,
)
from .small import BUILT, PREPARED, codes_of
from .symbols import current, first_there, is_reached, is_shared, layers_of

logger = logging.getLogger("pystage.sglang")


def verify() -> None:
    """Checks that calls reach each hook, decides what is left to SGLang, and logs the result."""
    state = process.state
    found = {hook.part: why for hook in state.hooks if (why := is_reached(hook))}
    parts = dict.fromkeys(hook.part for hook in state.hooks if hook.part != "log")
    state.broken = [f"{part} ({why})" for part, why in found.items()]
    for part, wanted in (
        ("sizer", state.settings.sizer),
        ("budget", state.settings.budget_ms > 0),
        ("correction", state.settings.correct),
        ("validation", state.settings.validate_ids),
    ):
        if wanted and part not in parts:
            state.broken.append(f"{part} (this SGLang has no such symbols)")

    inactive = {part: f"{part} is not active" for part in found}
    left = {
        "history": state.no_history
        or inactive.get("staging")
        or _shared("staging", "history")
        or _unknown(PREPARE),
        "mixed": inactive.get("resolve") or _shared("resolve") or _unknown(RESOLVE),
    }
    state.small_codes, state.writes_rows = {}, False
    if state.settings.small:
        left["small"] = inactive.get("staging") or inactive.get("guard") or _no_small()
        left["rows"] = inactive.get("rows") or _no_rows()
    left = {part: why for part, why in left.items() if why and part not in found}
    state.left = [f"{part} ({why})" for part, why in left.items()]
    state.active = [part for part in parts if part not in found and part not in left]
    state.gives_views = "history" in state.active
    state.preempts = "mixed" not in left
    if state.preempts:
        state.active.insert(state.active.index("resolve") + 1, "mixed")
    if state.small_codes:
        at = next((i for i, part in enumerate(state.active) if part in ("rows", "metrics")), None)
        state.active.insert(len(state.active) if at is None else at, "small")
    if state.broken or state.left:
        state.said = True
        logger.warning("%s", state)
    else:
        state.say()


def _shared(*names: str) -> str:
    """Why these symbols, or the symbols of these parts, do not belong to the plugin alone; empty if
    they do."""
    reasons = (
        is_shared(hook)
        for hook in process.state.hooks
        if hook.part in names or hook.target in names
    )
    return next(filter(None, reasons), "")


def _no_small() -> str:
    """Why the small tensors of a batch are left to SGLang; empty if they are not."""
    if why := _shared(*PREPARE, *BUILD):
        return why
    functions = []
    try:
        for targets in (PREPARE, ALLOCATE, SAMPLING, BUILD):
            target = first_there(targets)
            function = layers_of(current(target))[-1]
            if targets in (ALLOCATE, SAMPLING) and function is not current(target):
                return f"another plugin hooks {target}"
            release_of(targets, function)
            functions.append(function)
    except LookupError as error:
        return str(error)
    prepare, allocate, sampling, build = functions
    process.state.small_codes = {
        PREPARED: (codes_of(prepare, allocate), codes_of(sampling)),
        BUILT: (codes_of(build),),
    }
    return ""


def _no_rows() -> str:
    """Why the rows of KV indices are left to SGLang; empty if they are not."""
    why = _shared("rows") or _unknown(WRITE_ROWS)
    process.state.writes_rows = not why
    return why


def _unknown(targets: tuple[str, ...]) -> str:
    """Why the code of this function of SGLang is not known; empty if it is."""
    try:
        release_of(targets, layers_of(current(first_there(targets)))[-1])
    except LookupError as error:
        return str(error)
    return ""
