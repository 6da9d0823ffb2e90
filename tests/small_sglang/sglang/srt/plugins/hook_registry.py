import functools
import logging
import pkgutil
import sys
from collections import defaultdict
from enum import Enum
from typing import ClassVar


class HookType(Enum):
    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"
    REPLACE = "replace"


class HookRegistry:
    _hooks: ClassVar = defaultdict(list)
    _patched: ClassVar = set()

    @classmethod
    def register(cls, target, hook, hook_type=HookType.AFTER):
        cls._hooks[target].append((hook_type, hook))

    @classmethod
    def apply_hooks(cls):
        for target, hooks in sorted(cls._hooks.items()):
            if target not in cls._patched:
                try:
                    cls._apply_target(target, hooks)
                    cls._patched.add(target)
                except Exception:
                    logging.getLogger(__name__).exception("Failed to apply hooks to %s", target)

    @classmethod
    def _apply_target(cls, target, hooks):
        owner, _, name = target.rpartition(".")
        owner = pkgutil.resolve_name(owner)
        raw = vars(owner)[name]
        original = wrapped = getattr(raw, "__func__", raw)
        for hook_type, hook in sorted(hooks, key=lambda h: h[0] is not HookType.REPLACE):
            wrapped = _wrap(wrapped, hook, hook_type)
        setattr(owner, name, classmethod(wrapped) if isinstance(raw, classmethod) else wrapped)
        _propagate_patch(original, wrapped)


def _propagate_patch(original, wrapped):
    """Modules that imported the original by its name get the wrapper."""
    for module in list(sys.modules.values()):
        for name, value in list(vars(module).items()):
            if value is original:
                setattr(module, name, wrapped)


def _wrap(function, hook, hook_type):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if hook_type is HookType.REPLACE:
            return hook(*args, **kwargs)
        if hook_type is HookType.AROUND:
            return hook(function, *args, **kwargs)
        if hook_type is HookType.BEFORE:
            args, kwargs = hook(*args, **kwargs) or (args, kwargs)
            return function(*args, **kwargs)
        result = function(*args, **kwargs)
        changed = hook(result, *args, **kwargs)
        return result if changed is None else changed

    wrapper.__wrapped__ = function
    return wrapper
