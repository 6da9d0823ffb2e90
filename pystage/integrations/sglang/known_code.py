"""Checks that SGLang's functions do what the plugin does in their place.

From release to release, names of symbols and parameters stay the same while the code behind them
changes. So these checks look at the code itself. They run ``get_fill_ids`` on made-up requests, and
compare the fingerprints of ``resolve_forward_inputs`` and others with those of known releases.
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

from ..._C import ids_view


class OtherCodeError(LookupError):
    """A function does something else than the plugin would do in its place. The message says
    what."""


# --- Req.get_fill_ids ----------------------------------------------------------------------------

_IDS = "full_untruncated_fill_ids"
_STUB_LENGTH = 70_001
_WITHIN = (0, 1, 2, 4097, _STUB_LENGTH // 2, 65_537, _STUB_LENGTH - 1, _STUB_LENGTH)
_ENDS = (*_WITHIN, _STUB_LENGTH + 1, 1 << 40, -1, -7, -_STUB_LENGTH, -_STUB_LENGTH - 1)


def end_of_fill_ids(get_fill_ids: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function that reads END from a request, if ``get_fill_ids`` returns
    ``full_untruncated_fill_ids[:END]``.

    The attribute END has a different name in some releases (``fill_len``, ``extend_range.end``,
    ``extend_end``), so this function reads the name from the code. Then it runs the code on
    requests that have only distinct ids and an END. END lies within the ids, beyond them, or is
    negative.

    Raises:
        OtherCodeError: for some END, the code does not return a new array with exactly these ids.
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
        except Exception as error:  # whatever it raises, it is not code that we know
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


# --- functions that are known --------------------------------------------------------------------

# The plugin resolves a batch itself and then passes it to SGLang's resolve_forward_inputs, which
# skips the branches that would have made the ids. Of the other functions, it replaces a part (see
# small.py). Their code was reviewed for these releases.
RESOLVE = ("managers.overlap_utils:resolve_forward_inputs",)
_ALLOCATION = ("mem_cache.allocation", "mem_cache.common")  # it moved in 0.5.16
PREPARE = ("managers.schedule_batch:ScheduleBatch.prepare_for_extend",)
ALLOCATE = tuple(f"{module}:alloc_for_extend" for module in _ALLOCATION)
SAMPLING = ("sampling.sampling_batch_info:SamplingBatchInfo.from_schedule_batch",)
BUILD = ("model_executor.forward_batch_info:ForwardBatch.init_new",)
WRITE_ROWS = tuple(f"{module}:write_cache_indices" for module in _ALLOCATION)

KNOWN: dict[tuple[str, ...], dict[str, str]] = {
    RESOLVE: {
        "48794cd77b07b213": "0.5.13",
        "9e9738ca722ec6ed": "0.5.14 to 0.5.18",
        "cf5ac3557ac30aa5": "0.5.19 to 0.5.21",
        "3b24c71f47d18046": "0.5.22 and 0.5.23",
    },
    PREPARE: {
        "e58007da837e36ad": "0.5.13 and 0.5.14",
        "2a530bce27419a89": "0.5.15",
        "86f8872a5bddb417": "0.5.16 and 0.5.17",
        "8e7059d6382b9300": "0.5.18",
        "b00b0866822e4e75": "0.5.19",
        "4a7222511d9fcea9": "0.5.20",
        "0e2e74d0d98a5e39": "0.5.21",
        "37dc5a3ef64639cf": "0.5.22",
        "3e7ab08cf3a03d1a": "0.5.23",
    },
    ALLOCATE: {
        "36ab91264356581c": "0.5.13",
        "4d4b2a47cff54b61": "0.5.14",
        "0309fed34b7069d5": "0.5.15",
        "8ddbad5cc1e4a7d1": "0.5.16",
        "80fa6a3559da460e": "0.5.17",
        "c065aca322d474fb": "0.5.18",
        "cdd309f97add8679": "0.5.19 to 0.5.21",
        "c2fb717fa5d125ce": "0.5.22 and 0.5.23",
    },
    SAMPLING: {
        "5f4a4bca0003aeeb": "0.5.13",
        "467188c60ecb4590": "0.5.14 and 0.5.15",
        "8e85cf1c2c3e2790": "0.5.16",
        "cd2d260e96d32121": "0.5.17",
        "79d76d14e0e8ca7e": "0.5.18 and 0.5.19",
        "ef2914e65213cec5": "0.5.20",
        "37051d58cbac3114": "0.5.21",
        "1e3e08ec6a3cb501": "0.5.22 and 0.5.23",
    },
    BUILD: {
        "7dfcd034e4792d7c": "0.5.13",
        "f5590ec82df35b84": "0.5.14",
        "f2eec40e0166eee5": "0.5.15",
        "30ff0f6963368b53": "0.5.16",
        "9dad62e3f809bcf8": "0.5.17",
        "d87d772da8cd4f4d": "0.5.18",
        "a4b4f316ac9ebaca": "0.5.19",
        "3fe71f6e177aa465": "0.5.20",
        "907186310c8b745a": "0.5.21",
        "39b65c94686792a3": "0.5.22",
        "f360b2a8bef56a7a": "0.5.23",
    },
    WRITE_ROWS: {
        "64901075dc67652c": "0.5.13",
        "a541f379056ee751": "0.5.14",
        "850ae2843bf86dee": "0.5.15",
        "26a044a0bdd6a6be": "0.5.16",
        "333b8b1b6fb6889c": "0.5.17",
        "9da6e4d0fde57f05": "0.5.18 to 0.5.23",
    },
}


def release_of(targets: tuple[str, ...], function: Any) -> str:
    """The releases that have exactly this function. ``targets`` lists the places where it may be.

    Raises:
        OtherCodeError: its fingerprint is not in ``KNOWN[targets]``.
    """
    found = fingerprint(function)
    if found not in KNOWN[targets]:
        name = targets[0].rpartition(":")[2].rpartition(".")[2]
        raise OtherCodeError(
            f"its {name} is not that of a known release: fingerprint "
            f"{found or 'unknown, it has no source'}"
        )
    return KNOWN[targets][found]


# --- fingerprints ---------------------------------------------------------------------------------


def fingerprint(function: Any) -> str:
    """A hash of a function's code: 16 hex digits, or "" if there is no source.

    Comments, layout, docstrings and annotations do not change it; decorators do. Every version of
    Python gives the same hash.
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
    """Leaves out empty fields, because later versions of Python have more of them."""
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
    """Whether the node is a statement that is only a string. It has no effect, wherever it is."""
    return isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)
