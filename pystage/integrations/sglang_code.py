"""Whether SGLang's functions do what the plugin does in their place.

Names of symbols and parameters stay the same from release to release while the code behind them
changes. So the code itself is looked at: ``get_fill_ids`` is run on made-up requests, and
``resolve_forward_inputs`` is compared with those that are known.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import operator
import textwrap
from array import array
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from .._C import ids_view


class OtherCodeError(LookupError):
    """A function does something else than the plugin would do in its place; says what."""


# --- Req.get_fill_ids ----------------------------------------------------------------------------

_IDS = "full_untruncated_fill_ids"
_STUB_LENGTH = 70_001
_WITHIN = (0, 1, 2, 4097, _STUB_LENGTH // 2, 65_537, _STUB_LENGTH - 1, _STUB_LENGTH)
_ENDS = (*_WITHIN, _STUB_LENGTH + 1, 1 << 40, -1, -7, -_STUB_LENGTH, -_STUB_LENGTH - 1)


def end_of_fill_ids(get_fill_ids: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What reads a request's END, where ``get_fill_ids`` is ``full_untruncated_fill_ids[:END]``.

    END is an attribute that each release calls otherwise (``fill_len``, ``extend_range.end``,
    ``extend_end``): its name is read from the code. Then the code is run on requests that have
    nothing but distinct ids and an END, which lies within them, beyond them, or is negative.

    Raises:
        OtherCodeError: it gives, for any END, something else than these ids, as a new array.
    """
    code = getattr(get_fill_ids, "__code__", None)
    names: tuple[str, ...] = code.co_names if code else ()
    if code is None or len(names) < 2 or names[0] != _IDS or code.co_freevars:
        raise OtherCodeError(f"get_fill_ids is not self.{_IDS}[:END]")
    if len(inspect.signature(get_fill_ids).parameters) != 1:
        raise OtherCodeError("get_fill_ids takes more than the request")
    path = ".".join(names[1:])
    end_of = operator.attrgetter(path)
    ids = array("q", range(1000, 1000 + _STUB_LENGTH))
    for end in _ENDS:
        value: Any = end
        for name in reversed(names[1:]):
            value = SimpleNamespace(**{name: value})
        setattr(value, _IDS, ids)
        try:
            found = get_fill_ids(value)
        except Exception as error:  # whatever their code raises, it is not the code we know
            raise OtherCodeError(
                f"get_fill_ids is not self.{_IDS}[:self.{path}]: {error}"
            ) from error
        expected = ids_view(ids, 0, end_of(value)).copy()
        if type(found) is not array or found is ids or found != expected:
            raise OtherCodeError(
                f"get_fill_ids is not self.{_IDS}[:self.{path}]: of {_STUB_LENGTH} ids, with "
                f"{path} = {end}, it gives {_described(found)}, not {len(expected)} ids"
            )
    return end_of


def _described(found: Any) -> str:
    same = "the request's own array" if type(found) is array else f"a {type(found).__name__}"
    return f"{same} of {len(found)}" if hasattr(found, "__len__") else same


# --- resolve_forward_inputs ----------------------------------------------------------------------

# The plugin resolves a batch itself and hands it on with its ids, so that SGLang's code skips the
# branches that would have made them. What these branches do has been read for these releases.
KNOWN_RESOLVERS = {
    "48794cd77b07b213": "0.5.13",
    "9e9738ca722ec6ed": "0.5.14 to 0.5.18",
    "cf5ac3557ac30aa5": "0.5.19 to 0.5.21",
    "3b24c71f47d18046": "0.5.22 and 0.5.23",
}


def resolver_release(resolve_forward_inputs: Any) -> str:
    """The releases whose ``resolve_forward_inputs`` this is.

    Raises:
        OtherCodeError: it is none of ``KNOWN_RESOLVERS``.
    """
    found = fingerprint(resolve_forward_inputs)
    if found not in KNOWN_RESOLVERS:
        raise OtherCodeError(
            "its resolve_forward_inputs is not that of a known release: fingerprint "
            f"{found or 'unknown, it has no source'}"
        )
    return KNOWN_RESOLVERS[found]


def fingerprint(function: Any) -> str:
    """A hash of what a function's code says: 16 hex digits, or "" where there is no source.

    Comments, layout, docstring and annotations do not count, and every version of Python gives the
    same. Decorators count.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return ""
    return hashlib.sha256(_said(tree).encode()).hexdigest()[:16]


_UNSAID = frozenset({"annotation", "returns", "type_comment", "type_params", "kind", "ctx"})


@functools.singledispatch
def _said(node: Any) -> str:
    return repr(node)


@_said.register
def _(node: ast.AST) -> str:
    """Fields that are empty are left out: later versions of Python have more of them."""
    parts = [
        f"{name}={_said(value)}"
        for name, value in ast.iter_fields(node)
        if name not in _UNSAID and value is not None and value != []
    ]
    return f"{type(node).__name__}({', '.join(parts)})"


@_said.register
def _(nodes: list) -> str:  # type: ignore[type-arg]
    return f"[{', '.join(_said(node) for node in nodes if not _is_docstring(node))}]"


def _is_docstring(node: Any) -> bool:
    """A string that stands alone says nothing to the machine, wherever it stands."""
    return isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)
