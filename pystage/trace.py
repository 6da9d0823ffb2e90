"""Length traces of LLM services, and the prefill batches that chunked prefill makes of them.

A trace has lengths but no ids; :func:`with_token_ids` draws random ids for it. Requests are used in
the order of the file. Arrival times are ignored.
"""

from __future__ import annotations

import csv
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import chain
from typing import Any

import numpy as np

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOONCAKE_COLUMNS = ("timestamp_ms", "input_length", "output_length", "reused_prefix_blocks")
MOONCAKE_BLOCK_TOKENS = 512
LONGEST_REQUEST_TOKENS = 1 << 24
DEFAULT_CHUNK_TOKENS = 8192
DEFAULT_MAX_REQUESTS = 1024
DEFAULT_VOCAB_SIZE = 128_256


class TraceError(ValueError):
    """A trace cannot be read. The message names the file and, for a bad row, the line."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a trace.

    Attributes:
        length: length of the whole prompt in tokens, at least 1.
        history: number of tokens at the start of the prompt that are in the KV cache already and
            are not prefilled. Less than ``length``, because the logits of the last token must be
            computed.

    Raises:
        ValueError: a length is out of bounds.
    """

    length: int
    history: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.length <= LONGEST_REQUEST_TOKENS:
            raise ValueError(
                f"a request of {self.length} tokens, outside [1, {LONGEST_REQUEST_TOKENS}]"
            )
        if not 0 <= self.history < self.length:
            raise ValueError(f"a history of {self.history} tokens, outside [0, {self.length})")


@dataclass(frozen=True, slots=True)
class Batch:
    """One prefill batch: three lists with one entry for each request in it.

    Attributes:
        requests: index of each request in the trace, from 0.
        starts: index of each request's first token in this batch, as for
            :meth:`pystage.StagingPool.stage`.
        stops: one past the index of each request's last token in this batch.
    """

    requests: list[int]
    starts: list[int]
    stops: list[int]

    @property
    def tokens(self) -> int:
        """The number of tokens in the batch."""
        return sum(self.stops) - sum(self.starts)


def read_trace(path: str | os.PathLike[str]) -> list[Request]:
    """Reads an Azure or a Mooncake trace, as CSV or as JSON Lines (one object per line).

    CSV columns of Azure: ``TIMESTAMP,ContextTokens,GeneratedTokens``. CSV columns of Mooncake:
    ``timestamp_ms,input_length,output_length,reused_prefix_blocks``. The reused prefix, in blocks
    of 512 tokens, is the request's history. Other columns are ignored.

    Fields in JSON Lines: ``ContextTokens``, or ``input_length`` with either
    ``reused_prefix_blocks`` or ``hash_ids``. Mooncake publishes ``hash_ids``, with one id for each
    block of 512 tokens. Leading blocks whose ids occurred in an earlier request are history. Other
    fields are ignored.

    Raises:
        TraceError: the columns or fields are others, there are no requests, or a row is bad.
        OSError: the file cannot be read.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as lines:
            return parse_trace(lines, os.fspath(path))
    except UnicodeDecodeError as error:
        raise TraceError(f"{os.fspath(path)}: not a text file in UTF-8 ({error})") from error


def sample_trace() -> list[Request]:
    """The trace included in pystage: 1,000 requests of the Azure conversation trace of 2023."""
    name = "azure-conv-sample.csv"
    text = (resources.files("pystage") / "data" / name).read_text(encoding="utf-8")
    return parse_trace(text.splitlines(), name)


def parse_trace(lines: Iterable[str], name: str) -> list[Request]:
    """Reads a trace from lines of CSV or JSON. Error messages call it ``name``.

    Raises:
        TraceError: as for :func:`read_trace`.
    """
    lines = iter(lines)
    first = next(lines, "")
    lines = chain([first], lines)
    if first.lstrip().startswith("{"):
        return _parse_json_lines(lines, name)
    reader = csv.DictReader(lines)
    try:
        header = reader.fieldnames or ()
        if not header:
            raise TraceError(f"{name}: empty; expected {_expected_columns()}")
        if set(AZURE_COLUMNS) <= set(header):
            parse_row = _azure_request
        elif set(MOONCAKE_COLUMNS) <= set(header):
            parse_row = _mooncake_request
        else:
            raise TraceError(
                f"{name}: its columns are {','.join(header)}; expected {_expected_columns()}"
            )
        requests = []
        for row in reader:
            try:
                _require_whole(row, len(header))
                requests.append(parse_row(row))
            except ValueError as error:
                raise TraceError(f"{name}, line {reader.line_num}: {error}") from error
    except csv.Error as error:
        raise TraceError(f"{name}, after line {reader.line_num}: {error}") from error
    if not requests:
        raise TraceError(f"{name}: no requests below the header")
    return requests


def prefill_batches(
    requests: Iterable[Request],
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    max_requests: int = DEFAULT_MAX_REQUESTS,
) -> Iterator[Batch]:
    """Makes prefill batches as chunked prefill does: first come, first served, with a token budget.

    A batch takes requests until it has ``chunk_tokens`` tokens or ``max_requests`` requests. A
    request that does not fit is cut, and its rest comes first in the next batch. KV memory is not
    limited, and chunks are not rounded to its pages.

    Args:
        requests: the requests in order. The iterable may be endless; it is read only as batches are
            needed.
        chunk_tokens: the most tokens in a batch.
        max_requests: the most requests in a batch.

    Raises:
        ValueError: ``chunk_tokens`` or ``max_requests`` is less than 1.
    """
    if chunk_tokens < 1 or max_requests < 1:
        raise ValueError(f"{chunk_tokens=} and {max_requests=}: both must be at least 1")
    return _fill_batches(requests, chunk_tokens, max_requests)


def with_token_ids(
    batches: Iterable[Batch],
    requests: Sequence[Request],
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    seed: int = 0,
) -> Iterator[tuple[Batch, list[array[int]]]]:
    """Adds the ids of each request in a batch: whole requests, with history and later chunks.

    A request's ids are drawn for its first batch and dropped after its last one, so memory holds
    only the ids of requests in flight.

    Args:
        batches: batches of ``requests``, from :func:`prefill_batches`.
        requests: the trace. An index past its end continues at the first request, so
            ``prefill_batches(itertools.cycle(requests))`` works too.
        vocab_size: ids are uniform in ``[0, vocab_size)``. At least 1.
        seed: a request's ids depend on the seed and the request's index, not on the batches.

    Yields:
        Each batch, with one ``array('q')`` for each entry of ``batch.requests``.
    """
    lengths = [request.length for request in requests]
    live: dict[int, array[int]] = {}
    for batch in batches:
        for index in batch.requests:
            if index not in live:
                length = lengths[index % len(lengths)]
                live[index] = draw_ids(length, vocab_size, (seed, index))
        yield batch, [live[index] for index in batch.requests]
        for index, stop in zip(batch.requests, batch.stops, strict=True):
            if stop == len(live[index]):
                del live[index]


def draw_ids(length: int, vocab_size: int, seed: int | Sequence[int]) -> array[int]:
    """Draws ``length`` ids, uniform in ``[0, vocab_size)``. The same seed gives the same ids.

    Raises:
        ValueError: ``vocab_size`` is less than 1, or ``length`` is negative.
    """
    if length < 0 or vocab_size < 1:
        raise ValueError(f"{length=} must not be negative, {vocab_size=} must be at least 1")
    drawn = np.random.default_rng(seed).integers(0, vocab_size, length, dtype=np.int64)
    ids = array("q")
    ids.frombytes(drawn.tobytes())
    return ids


def _fill_batches(
    requests: Iterable[Request], chunk_tokens: int, max_requests: int
) -> Iterator[Batch]:
    batch, room = Batch([], [], []), chunk_tokens
    for index, request in enumerate(requests):
        start = request.history
        while start < request.length:
            stop = min(request.length, start + room)
            batch.requests.append(index)
            batch.starts.append(start)
            batch.stops.append(stop)
            room -= stop - start
            start = stop
            if room == 0 or len(batch.requests) == max_requests:
                yield batch
                batch, room = Batch([], [], []), chunk_tokens
    if batch.requests:
        yield batch


def _azure_request(row: Mapping[str, str]) -> Request:
    return Request(_count(row, "ContextTokens"))


def _mooncake_request(row: Mapping[str, str]) -> Request:
    return _request_behind_blocks(_count(row, "input_length"), _count(row, "reused_prefix_blocks"))


def _request_behind_blocks(length: int, blocks: int) -> Request:
    # The last block of a prompt may be only partly filled, and the trace counts it as a whole one.
    if blocks * MOONCAKE_BLOCK_TOKENS >= length + MOONCAKE_BLOCK_TOKENS:
        raise ValueError(
            f"reused_prefix_blocks is {blocks}: more than a prompt of {length} tokens has"
        )
    return Request(length, max(0, min(blocks * MOONCAKE_BLOCK_TOKENS, length - 1)))


def _count(row: Mapping[str, str], column: str) -> int:
    text = row[column].strip()
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise ValueError(f"{column} is {text[:40]!r}, not a count of tokens")
    return int(text)


def _parse_json_lines(lines: Iterable[str], name: str) -> list[Request]:
    requests: list[Request] = []
    seen = set[int | str]()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            requests.append(_json_request(json.loads(line), seen))
        except json.JSONDecodeError as error:
            text = f"not JSON: {error.msg} at column {error.colno}"
            raise TraceError(f"{name}, line {number}: {text}") from error
        except (ValueError, RecursionError) as error:
            raise TraceError(f"{name}, line {number}: {error}") from error
    return requests


def _json_request(row: Any, seen: set[int | str]) -> Request:
    """Makes a request from one JSON object, and adds the ids of its blocks to ``seen``."""
    if not isinstance(row, dict):
        raise ValueError("not an object")
    if "ContextTokens" in row:
        return Request(_number(row, "ContextTokens"))
    if "input_length" in row and "reused_prefix_blocks" in row:
        return _request_behind_blocks(
            _number(row, "input_length"), _number(row, "reused_prefix_blocks")
        )
    if "input_length" not in row or "hash_ids" not in row:
        raise ValueError(
            f"its fields are {', '.join(row) or 'none'}; expected ContextTokens (Azure), or "
            "input_length and hash_ids or reused_prefix_blocks (Mooncake)"
        )
    length, ids = _number(row, "input_length"), row["hash_ids"]
    if not isinstance(ids, list) or not all(isinstance(i, (int, str)) for i in ids):
        raise ValueError("hash_ids is not a list of block ids")
    if len(ids) > -(-length // MOONCAKE_BLOCK_TOKENS):
        raise ValueError(
            f"{len(ids)} hash_ids for a prompt of {length} tokens: a block is of "
            f"{MOONCAKE_BLOCK_TOKENS} tokens"
        )
    reused = next((at for at, block in enumerate(ids) if block not in seen), len(ids))
    seen.update(ids)
    return _request_behind_blocks(length, reused)


def _number(row: Mapping[str, Any], field: str) -> int:
    value = row[field]
    if type(value) is not int or value < 0:
        raise ValueError(f"{field} is {json.dumps(value)[:40]}, not a count of tokens")
    return value


def _require_whole(row: Mapping[str | None, str | None], columns: int) -> None:
    if None in row or None in row.values():
        raise ValueError(f"it does not have the {columns} fields of the header")


def _expected_columns() -> str:
    return f"{','.join(AZURE_COLUMNS)} (Azure) or {','.join(MOONCAKE_COLUMNS)} (Mooncake)"
