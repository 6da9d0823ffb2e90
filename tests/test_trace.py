"""Traces: reading them, splitting them into prefill batches, and drawing their ids."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pystage.trace import (
    LONGEST_REQUEST_TOKENS,
    Batch,
    Request,
    TraceError,
    draw_ids,
    parse_trace,
    prefill_batches,
    read_trace,
    sample_trace,
    with_token_ids,
)

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"
MOONCAKE = "timestamp_ms,input_length,output_length,reused_prefix_blocks"


def requests() -> st.SearchStrategy[Request]:
    return st.builds(
        lambda prefilled, history: Request(history + prefilled, history),
        st.integers(1, 60),
        st.integers(0, 40),
    )


# --- reading


def test_azure_columns() -> None:
    lines = [AZURE, "2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,396,109"]
    assert parse_trace(lines, "t") == [Request(374), Request(396)]


def test_mooncake_prefix_blocks_are_history() -> None:
    lines = [MOONCAKE, "0,6758,500,0", "0,7322,490,1", "3000,7322,490,14"]
    assert parse_trace(lines, "t") == [
        Request(6758),
        Request(7322, history=512),
        Request(7322, history=14 * 512),
    ]


def test_a_prompt_seen_whole_still_prefills_its_last_token() -> None:
    # 1,902 tokens are 4 blocks, the last part filled; 1,024 are two whole ones
    lines = [MOONCAKE, "0,1902,1,4", "0,1024,1,2"]
    assert parse_trace(lines, "t") == [Request(1902, 1901), Request(1024, 1023)]


def test_columns_in_any_order_among_others_with_byte_order_mark_and_crlf(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(
        b"\xef\xbb\xbfGeneratedTokens,model,ContextTokens,TIMESTAMP\r\n44,m,374,then\r\n"
    )
    assert read_trace(path) == [Request(374)]


def test_sample() -> None:
    sample = sample_trace()
    assert len(sample) == 1000
    assert sample[:2] == [Request(374), Request(396)]
    assert sum(request.length for request in sample) == 1_014_189


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"^t: empty; expected TIMESTAMP,.*timestamp_ms,"),
        (["a,b,c", "1,2,3"], r"^t: its columns are a,b,c; expected TIMESTAMP,.*timestamp_ms,"),
        ([AZURE], r"^t: no requests below the header$"),
        ([AZURE, "x,374,44", "x,many,44"], r"^t, line 3: ContextTokens is 'many'"),
        ([AZURE, "x,,44"], r"^t, line 2: ContextTokens is ''"),
        ([AZURE, "x,-5,44"], r"^t, line 2: ContextTokens is '-5'"),
        ([AZURE, "x,1.5,44"], r"^t, line 2: ContextTokens is '1.5'"),
        ([AZURE, "x," + "9" * 5000 + ",44"], r"^t, line 2: ContextTokens is '9+', not a count"),
        ([AZURE, "x,0,44"], r"^t, line 2: a request of 0 tokens"),
        ([AZURE, f"x,{LONGEST_REQUEST_TOKENS + 1},44"], r"^t, line 2: a request of \d+ tokens"),
        ([AZURE, "x,374"], r"^t, line 2: it does not have the 3 fields"),
        ([AZURE, "x,374,44,5"], r"^t, line 2: it does not have the 3 fields"),
        ([AZURE, "x,374," + "4" * 200_000], r"^t, after line 1: field larger"),
        ([MOONCAKE, "0,1024,1,-1"], r"^t, line 2: reused_prefix_blocks is '-1'"),
        ([MOONCAKE, "0,1024,1,3"], r"^t, line 2: reused_prefix_blocks is 3: more than a prompt"),
        ([MOONCAKE, "0,0,1,0"], r"^t, line 2: a request of 0 tokens"),
    ],
)
def test_bad_traces_say_where_and_why(lines: list[str], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        parse_trace(lines, "t")


def test_json_lines_of_mooncake(tmp_path: Path) -> None:
    """Leading blocks that an earlier request had are history, wherever it had them."""
    path = tmp_path / "conversation_trace.jsonl"
    path.write_text(
        '{"timestamp": 0, "input_length": 1300, "output_length": 9, "hash_ids": [1, 2, 3]}\n'
        '{"timestamp": 0, "input_length": 1536, "output_length": 9, "hash_ids": [1, 2, 4]}\n'
        "\n"
        '{"timestamp": 9, "input_length": 2000, "output_length": 9, "hash_ids": [5, 1, 2, 4]}\n'
        '{"timestamp": 9, "input_length": 1500, "output_length": 9, "hash_ids": [3, 4, 6]}\n'
        '{"timestamp": 9, "input_length": 1300, "output_length": 9, "hash_ids": [1, 2, 3]}\n'
    )
    assert read_trace(path) == [
        Request(1300),
        Request(1536, history=1024),
        Request(2000),
        Request(1500, history=1024),
        Request(1300, history=1299),
    ]


def test_json_lines_with_the_fields_of_the_csv_traces() -> None:
    lines = [
        '{"ContextTokens": 374, "GeneratedTokens": 44}',
        '{"input_length": 7322, "reused_prefix_blocks": 14}',
    ]
    assert parse_trace(lines, "t") == [Request(374), Request(7322, history=14 * 512)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON: Expecting property name enclosed in double quotes at column"),
        ('{"ContextTokens": 1} x', "not JSON: Extra data at column 22"),
        ("[1]", "not an object"),
        ('{"a":' * 100_000, "recursion"),
        ("{}", r"its fields are none; expected ContextTokens \(Azure\), or input_length and"),
        ('{"input_length": 5, "x": 1}', "its fields are input_length, x; expected ContextTokens"),
        ('{"ContextTokens": "374"}', r'ContextTokens is "374", not a count of tokens'),
        ('{"ContextTokens": true}', "ContextTokens is true, not a count of tokens"),
        ('{"ContextTokens": 0}', "a request of 0 tokens, outside"),
        ('{"input_length": -5, "hash_ids": []}', "input_length is -5, not a count of tokens"),
        ('{"input_length": 5, "hash_ids": 7}', "hash_ids is not a list of block ids"),
        ('{"input_length": 5, "hash_ids": [[]]}', "hash_ids is not a list of block ids"),
        ('{"input_length": 512, "hash_ids": [1, 2]}', "2 hash_ids for a prompt of 512 tokens: a"),
        ('{"input_length": 9, "reused_prefix_blocks": 2}', "reused_prefix_blocks is 2: more than"),
    ],
)
def test_bad_json_lines_say_where_and_why(line: str, message: str) -> None:
    with pytest.raises(TraceError, match=rf"^t, line 2: .*{message}"):
        parse_trace(['{"ContextTokens": 374}', line], "t")


def test_a_binary_file_is_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(TraceError, match=r"trace\.csv: not a text file in UTF-8"):
        read_trace(path)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_trace(tmp_path / "none.csv")


@pytest.mark.parametrize(("length", "history"), [(0, 0), (-1, 0), (5, 5), (5, -1)])
def test_requests_have_something_to_prefill(length: int, history: int) -> None:
    with pytest.raises(ValueError, match="tokens, outside"):
        Request(length, history)


# --- prefill batches


def test_a_request_that_does_not_fit_is_cut_and_goes_on_first() -> None:
    trace = [Request(6), Request(9, history=2), Request(3)]
    assert list(prefill_batches(trace, chunk_tokens=8)) == [
        Batch([0, 1], [0, 2], [6, 4]),
        Batch([1, 2], [4, 0], [9, 3]),
    ]


def test_a_long_request_fills_batches_alone() -> None:
    assert list(prefill_batches([Request(20)], chunk_tokens=8)) == [
        Batch([0], [0], [8]),
        Batch([0], [8], [16]),
        Batch([0], [16], [20]),
    ]


def test_max_requests() -> None:
    batches = list(prefill_batches([Request(1)] * 5, chunk_tokens=8, max_requests=2))
    assert [batch.requests for batch in batches] == [[0, 1], [2, 3], [4]]


@given(trace=st.lists(requests(), max_size=30), chunk=st.integers(1, 50), most=st.integers(1, 6))
def test_every_token_is_prefilled_once_and_in_order(
    trace: list[Request], chunk: int, most: int
) -> None:
    batches = list(prefill_batches(trace, chunk, most))
    prefilled = [
        (request, token)
        for batch in batches
        for request, start, stop in zip(batch.requests, batch.starts, batch.stops, strict=True)
        for token in range(start, stop)
    ]
    assert prefilled == [
        (index, token)
        for index, request in enumerate(trace)
        for token in range(request.history, request.length)
    ]


@given(trace=st.lists(requests(), max_size=30), chunk=st.integers(1, 50), most=st.integers(1, 6))
def test_batches_are_full_and_within_the_budget(
    trace: list[Request], chunk: int, most: int
) -> None:
    batches = list(prefill_batches(trace, chunk, most))
    for batch in batches:
        assert batch.tokens == sum(
            stop - start for start, stop in zip(batch.starts, batch.stops, strict=True)
        )
        assert 1 <= batch.tokens <= chunk
        assert 1 <= len(batch.requests) <= most
        assert len(set(batch.requests)) == len(batch.requests)
        assert all(start < stop for start, stop in zip(batch.starts, batch.stops, strict=True))
    for batch in batches[:-1]:
        assert batch.tokens == chunk or len(batch.requests) == most


def test_requests_are_read_no_further_than_needed() -> None:
    def first_two() -> Iterator[Request]:
        yield Request(4)
        yield Request(9)
        raise AssertionError("read a request too many")

    batches = prefill_batches(first_two(), chunk_tokens=8)
    assert next(batches) == Batch([0, 1], [0, 0], [4, 4])


@pytest.mark.parametrize(("chunk", "most"), [(0, 1), (1, 0), (-1, 1)])
def test_a_budget_is_at_least_one(chunk: int, most: int) -> None:
    with pytest.raises(
        ValueError, match=f"chunk_tokens={chunk} and max_requests={most}: both must"
    ):
        prefill_batches([Request(1)], chunk, most)


# --- ids


def test_ids_are_whole_requests_and_the_same_for_each_chunk() -> None:
    trace = [Request(6), Request(30, history=5), Request(3)]
    for chunk in (4, 9, 100):
        for batch, ids in with_token_ids(prefill_batches(trace, chunk), trace, 1000, seed=7):
            assert len(ids) == len(batch.requests)
            for index, of_request in zip(batch.requests, ids, strict=True):
                assert of_request.typecode == "q"
                assert of_request == draw_ids(trace[index].length, 1000, (7, index))


def test_requests_and_seeds_have_different_ids() -> None:
    assert draw_ids(64, 1000, (0, 0)) == draw_ids(64, 1000, (0, 0))
    different = [draw_ids(64, 1000, seed) for seed in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    assert len({tuple(ids) for ids in different}) == 4


@pytest.mark.parametrize("vocab_size", [1, 2, 50, 1 << 40])
def test_ids_lie_within_the_vocabulary_and_fill_it(vocab_size: int) -> None:
    ids = draw_ids(2000, vocab_size, 3)
    assert min(ids) >= 0
    assert max(ids) < vocab_size
    if vocab_size <= 50:
        assert set(ids) == set(range(vocab_size))
    else:
        assert max(ids) > vocab_size // 2


@pytest.mark.parametrize(("length", "vocab_size"), [(-1, 8), (8, 0), (8, -5)])
def test_ids_that_cannot_be_drawn(length: int, vocab_size: int) -> None:
    with pytest.raises(ValueError, match=f"length={length} must.* vocab_size={vocab_size} must"):
        draw_ids(length, vocab_size, 0)


def test_an_index_past_the_trace_counts_from_its_first_request() -> None:
    trace = [Request(3), Request(5)]
    repeated = with_token_ids(prefill_batches(cycle(trace), 8), trace)
    (_, first), (_, second) = islice(repeated, 2)
    assert [len(ids) for ids in first] == [3, 5]
    assert [len(ids) for ids in second] == [3, 5]
    assert first != second


def test_only_requests_in_flight_are_in_memory() -> None:
    trace = [Request(4)] * 50 + [Request(40)] + [Request(4)] * 50
    drawn = []
    for batch, ids in with_token_ids(prefill_batches(trace, 10), trace):
        drawn += [
            weakref.ref(of_request)
            for of_request, start in zip(ids, batch.starts, strict=True)
            if start == 0
        ]
        del ids
        alive = sum(reference() is not None for reference in drawn)
        assert alive <= len(batch.requests)
    assert len(drawn) == len(trace)
