"""Small tensors: values as a kernel's parameters, rows of a table, and tensors of known code.

This is one file because lists, rows and parcels share their pools and the limits of a kernel's
parameters.
"""

from __future__ import annotations

import random
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import pystage
from pystage import _C, ops
from pystage.testing import hold_transfers, synchronize

GPU = pytest.mark.gpu
PARAMETERS = 32 << 10  # bytes that a launch takes, at most
INF = float("inf")
LISTS = {
    torch.int32: [0, -1, 2**31 - 1, -(2**31)],
    torch.int64: [0, -1, 2**63 - 1, -(2**63)],
    torch.uint64: [0, 1, 2**64 - 1],
    torch.float32: [0.0, -1.5, 3, float("inf")],
    torch.bool: [True, False, 1, 0],
}


@pytest.mark.parametrize("dtype", LISTS, ids=str)
@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_each_dtype(pool: pystage.StagingPool, dtype: torch.dtype, kind: Any) -> None:
    (made,) = pool.small_tensors([kind(LISTS[dtype])], [dtype])
    assert made.device == pool.device and made.dtype == dtype
    assert torch.equal(made.cpu(), torch.tensor(LISTS[dtype], dtype=dtype))


def test_arrays_and_tensors_keep_their_shape(pool: pystage.StagingPool) -> None:
    arrays = [
        np.arange(6, dtype=np.int32).reshape(2, 3),
        torch.rand(4, 1),
        torch.arange(20)[::3],
        torch.tensor(5),
        torch.empty(0, 3, dtype=torch.int64),
        np.array([True, False]),
    ]
    made = pool.small_tensors(arrays)
    for array, tensor in zip(arrays, made, strict=True):
        expected = torch.as_tensor(array)
        assert tensor.shape == expected.shape and tensor.dtype == expected.dtype
        assert torch.equal(tensor.cpu(), expected)
    (narrow,) = pool.small_tensors([torch.arange(5)], [torch.int32])
    assert narrow.dtype == torch.int32 and narrow.tolist() == list(range(5))


def test_no_two_share_a_byte(pool: pystage.StagingPool) -> None:
    made = pool.small_tensors([[1], [2, 3], [], [4]], [torch.int32, *[torch.int64] * 3])
    made[1].fill_(-7)
    made[3].add_(1)
    assert [t.tolist() for t in made] == [[1], [-7, -7], [], [5]]
    assert all(t.data_ptr() % 16 == 0 for t in made if t.numel())
    assert pool.small_tensors([]) == ()


@pytest.mark.parametrize("values", [600, 8000])
def test_up_to_the_limit_by_parameters_and_beyond_through_a_slot(
    pool: pystage.StagingPool, values: int
) -> None:
    lists = [[random.randrange(1 << 60) for _ in range(values)] for _ in range(2)]
    before = pool.stats().kernel_transfers
    made = pool.small_tensors(lists, [torch.int64] * 2)
    assert [t.tolist() for t in made] == lists
    by_slot = 2 * 8 * values > PARAMETERS
    assert pool.stats().kernel_transfers - before == by_slot
    synchronize(pool)
    stats = pool.stats()
    assert stats.leased_slots == stats.in_flight_slots == 0


def test_any_length_to_the_limit_and_one_beyond(pool: pystage.StagingPool) -> None:
    for count in (1, 2, 3, 125, 126, 127, 505, 506, 507, 508, 4089, 4090, 4091, 4092, 4096, 4097):
        values = [random.randrange(1 << 60) for _ in range(count)]
        (made,) = pool.small_tensors([values], [torch.int64])
        assert made.tolist() == values


@pytest.mark.parametrize(
    ("value", "dtype", "error", "message"),
    [
        (
            [1, 1 << 40],
            torch.int32,
            ValueError,
            r"values\[1\]\[1\] is 1099511627776, which torch.int",
        ),
        ([-(1 << 31) - 1], torch.int32, ValueError, "-2147483649, which torch.int32 cannot hold"),
        ([-(1 << 63) - 1], torch.int64, ValueError, "cannot hold"),
        ([1 << 63], torch.int64, ValueError, "9223372036854775808, which torch.int64 cannot hold"),
        ([-1], torch.uint64, ValueError, "-1, which torch.uint64 cannot hold"),
        ([1 << 64], torch.uint64, ValueError, "cannot hold"),
        ([1e39], torch.float32, ValueError, r"1e\+39, which torch.float32 cannot hold"),
        ([2], torch.bool, ValueError, "2, which torch.bool cannot hold"),
        ([1.5], torch.int64, TypeError, r"values\[1\]\[0\] is a float, not an int"),
        (["1"], torch.float32, TypeError, "is a str, not a number"),
        ([[1]], torch.int32, TypeError, "is a list, not an int"),
        ([1], torch.float16, TypeError, "not torch.float16"),
        ([1], None, TypeError, "is a list, so it needs a dtype"),
        ([1], "int64", TypeError, "a torch.dtype, not a str"),
        (torch.tensor([1 << 40]), torch.int32, ValueError, "that torch.int32 cannot hold"),
        (torch.tensor([1.5]), torch.int64, ValueError, "cannot hold"),
        (torch.tensor([-INF], dtype=torch.float16), torch.int64, ValueError, "cannot hold"),
        (torch.tensor([-INF], dtype=torch.float16), torch.int32, ValueError, "cannot hold"),
        (torch.tensor([INF], dtype=torch.bfloat16), torch.uint64, ValueError, "cannot hold"),
        (torch.tensor([INF]).to(torch.float8_e5m2), torch.int32, ValueError, "cannot hold"),
        (torch.tensor([1.0], dtype=torch.float64), None, TypeError, "not torch.float64"),
        (torch.empty(3, device="meta"), None, ValueError, "on meta"),
    ],
)
def test_what_cannot_be_is_named(
    pool: pystage.StagingPool, value: Any, dtype: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pool.small_tensors([[1], value], [torch.int64, dtype])
    assert pool.small_tensors([[7]], [torch.int64])[0].tolist() == [7]


EDGES = {
    torch.uint8: [0, 1, 255],
    torch.int8: [-128, -1, 0, 1, 127],
    torch.uint16: [0, 1, 65535],
    torch.uint32: [0, 1, 2**31 - 1, 2**31, 2**32 - 1],
    torch.int32: [-(2**31), -1, 0, 1, 2, 2**31 - 1],
    torch.uint64: [0, 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1],
    torch.int64: [-(2**63), -(2**31) - 1, -1, 0, 1, 2, 2**31, 2**63 - 1],
    torch.bool: [False, True],
}


@pytest.mark.parametrize("dtype", LISTS, ids=str)
@pytest.mark.parametrize("source", EDGES, ids=str)
def test_a_tensor_holds_what_a_list_does(
    pool: pystage.StagingPool, source: torch.dtype, dtype: torch.dtype
) -> None:
    for value in EDGES[source]:
        try:
            (expected,) = pool.small_tensors([[value]], [dtype])
        except ValueError:
            with pytest.raises(ValueError, match="cannot hold"):
                pool.small_tensors([torch.tensor([value], dtype=source)], [dtype])
        else:
            (made,) = pool.small_tensors([torch.tensor([value], dtype=source)], [dtype])
            assert torch.equal(made.cpu(), expected.cpu())


@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_of_floats_integers_hold_whole_numbers_in_range(
    pool: pystage.StagingPool, source: torch.dtype
) -> None:
    ranges = {
        torch.int32: (-(2**31), 2**31),
        torch.int64: (-(2**63), 2**63),
        torch.uint64: (0, 2**64),
        torch.bool: (0, 2),
    }
    powers = [float(2**n) for n in (1, 15, 31, 32, 63, 64) if n < 16 or source != torch.float16]
    odd = [0.0, 1.0, -1.0, 0.5, float("nan"), float("inf")]
    for dtype, (least, end) in ranges.items():
        for value in (*odd, *powers, *(-p for p in powers)):
            given = torch.tensor([value], dtype=source)
            if least <= value < end and value % 1 == 0:
                (made,) = pool.small_tensors([given], [dtype])
                assert made.tolist() == [value]
            else:
                with pytest.raises(ValueError, match="cannot hold"):
                    pool.small_tensors([given], [dtype])


def test_float32_is_rounded_and_never_overflows(pool: pystage.StagingPool) -> None:
    values = np.array([0.7, float("nan"), float("-inf"), 3e38, -3e38])
    (made,) = pool.small_tensors([values], [torch.float32])
    assert torch.equal(made.cpu().nan_to_num(9), torch.tensor(values).float().nan_to_num(9))
    for value in (np.array([0, 1e39]), torch.tensor([1 + 0j])):
        with pytest.raises(ValueError, match=r"that torch\.float32 cannot hold"):
            pool.small_tensors([value], [torch.float32])


def test_as_many_dtypes_as_lists(pool: pystage.StagingPool) -> None:
    with pytest.raises(ValueError, match="2 lists of values, but 1 dtypes"):
        pool.small_tensors([[1], [2]], [torch.int64])


def test_a_list_that_changes_while_it_is_read(pool: pystage.StagingPool) -> None:
    values: list[Any] = [1, 2, 3]

    class Clears:
        def __index__(self) -> int:
            values.clear()
            return 5

    values[0] = Clears()
    with pytest.raises(pystage.PystageError, match="shrank"):
        pool.small_tensors([values], [torch.int64])


def test_what_a_number_raises_is_raised(pool: pystage.StagingPool) -> None:
    class Fails:
        def __index__(self) -> int:
            raise ZeroDivisionError

        def __float__(self) -> float:
            raise ZeroDivisionError

    for dtype in (torch.int64, torch.float32, torch.uint64, torch.bool):
        with pytest.raises(ZeroDivisionError):
            pool.small_tensors([[Fails()]], [dtype])


def test_a_closed_pool_makes_none(device: str) -> None:
    pool = pystage.StagingPool(device, 1 << 20)
    (kept,) = pool.small_tensors([[1, 2]], [torch.int64])
    pool.close()
    with pytest.raises(pystage.PoolClosedError):
        pool.small_tensors([[1]], [torch.int64])
    assert kept.tolist() == [1, 2]


LONG = list(range(PARAMETERS // 4))  # 64 KiB of int64


def test_beyond_the_capacity_as_the_policy_says(device: str) -> None:
    with pystage.StagingPool(device, 1 << 17, at_capacity="raise") as pool:
        held = pool.stage([list(range(1 << 14))])  # half of it
        other = pool.stage([list(range(1 << 14))])
        with pytest.raises(pystage.PoolExhaustedError) as raised:
            pool.small_tensors([LONG], [torch.int64])
        assert raised.value.stats.leased_slots == 2
        assert pool.small_tensors([[3]], [torch.int64])[0].tolist() == [3]  # needs no slot
        del held, other
    small = pystage.StagingPool(device, 1 << 16, at_capacity="raise")
    with small as pool, pytest.raises(pystage.RequestTooLargeError):
        pool.small_tensors([LONG, LONG], [torch.int64] * 2)
    with pystage.StagingPool(device, 1 << 17, at_capacity="fallback") as pool:
        held = pool.stage([list(range(1 << 14))])
        other = pool.stage([list(range(1 << 14))])
        assert pool.small_tensors([LONG], [torch.int64])[0].tolist() == LONG
        assert pool.stats().fallbacks == pool.stats().fallback_transfers == 1
        del held, other


def test_through_a_slot_the_host_device_waits(device: str) -> None:
    values = torch.arange(1 << 22)
    with pystage.StagingPool(device, 64 << 20) as pool:
        (made,) = pool.small_tensors([values])
        assert int(made[-1]) == len(values) - 1  # the last to be written


@GPU
@pytest.mark.parametrize("count", [8, len(LONG)], ids=["parameters", "slot"])
def test_ordered_on_the_stream_and_never_late(count: int) -> None:
    """The values are those of the call, whatever becomes of the list while the stream is busy."""
    with pystage.StagingPool("cuda:0", 8 << 20) as pool:
        stream = torch.cuda.Stream()
        pool.small_tensors([LONG[:count]], [torch.int64])  # kernels are loaded
        lists = [[random.randrange(1 << 60) for _ in range(count)] for _ in range(20)]
        expected = [list(values) for values in lists]
        with torch.cuda.stream(stream):
            with hold_transfers(pool):
                made = [pool.small_tensors([values], [torch.int64])[0] for values in lists]
                event = torch.cuda.Event()
                event.record()
                assert not event.query()
                for values in lists:
                    values[:] = [0] * count
                sums = [t.clone() for t in made]  # behind, on the same stream
            stream.synchronize()
        assert [t.tolist() for t in sums] == expected


@GPU
def test_a_capturing_stream_is_refused() -> None:
    with pystage.StagingPool("cuda:0", 1 << 20) as pool:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            torch.zeros(1, device="cuda:0")
            with pytest.raises(pystage.CaptureError, match="before the capture"):
                pool.small_tensors([[1]], [torch.int64])
            with pytest.raises(RuntimeError, match="before the capture"):
                ops.small_tensors([torch.ones(1)], device="cuda:0")


# --- the op --------------------------------------------------------------------------------------

OF_ANY_KIND = [
    torch.arange(3),
    torch.rand(2, 2, dtype=torch.float64),
    torch.tensor([True]),
    torch.arange(10)[::2],
    torch.empty(0),
    torch.rand(5, dtype=torch.float16),
    torch.rand(3, dtype=torch.complex64).conj(),
]


def test_the_op_takes_any_dtype(device: str) -> None:
    for values in (OF_ANY_KIND, [torch.rand(5000, 2), *OF_ANY_KIND], []):
        made = ops.small_tensors(values, device=device)
        assert len(made) == len(values)
        for value, tensor in zip(values, made, strict=True):
            assert tensor.device == torch.device(device) and tensor.shape == value.shape
            assert torch.equal(tensor.cpu(), value)
            assert value.numel() == 0 or tensor.data_ptr() != value.data_ptr()


@GPU
def test_the_op_takes_the_current_device() -> None:
    for values in ([torch.arange(5)], [torch.rand(9000)]):
        (made,) = ops.small_tensors(values, device="cuda")
        assert made.device == torch.device("cuda", torch.cuda.current_device())
        assert torch.equal(made.cpu(), values[0])
    with pystage.StagingPool("cuda:0", 1 << 20) as pool:  # the device is still known
        assert pool.small_tensors([[1]], [torch.int64])[0].tolist() == [1]


def test_the_op_in_a_graph(device: str) -> None:
    values = OF_ANY_KIND[:3]
    torch.library.opcheck(
        torch.ops.pystage.small_tensors.default, (values,), {"device": torch.device(device)}
    )


def test_the_op_knows_no_other_device() -> None:
    with pytest.raises(RuntimeError, match="no pystage device for xpu"):
        ops.small_tensors([torch.ones(1)], device="xpu:0")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="no pystage device for cuda"):
            ops.small_tensors([torch.ones(1)], device="cuda")


# --- rows ----------------------------------------------------------------------------------------


def rows_case(dice: random.Random, device: str, rows: int) -> dict[str, Any]:
    width = 700
    prefix_lens = [dice.choice([0, 1, 130, 400]) for _ in range(rows)]
    lens = [dice.choice([0, 1, 7, 300]) for _ in range(rows)]
    prefixes = [
        torch.tensor([dice.randrange(1 << 30) for _ in range(n + dice.randrange(3))]).to(device)
        if n
        else torch.empty(0, dtype=torch.int64)
        for n in prefix_lens
    ]
    rest = torch.tensor([dice.randrange(1 << 30) for _ in range(sum(lens) + 2)], device=device)
    return {
        "table": torch.full((rows + 3, width), -1, dtype=torch.int32, device=device),
        "rest": rest,
        "prefixes": prefixes,
        "rows": torch.tensor(dice.sample(range(rows + 3), rows)),
        "prefix_lens": torch.tensor(prefix_lens),
        "lens": torch.tensor(lens),
    }


def written(case: dict[str, Any]) -> torch.Tensor:
    table, at = case["table"].to("cpu", copy=True), 0
    for i, row in enumerate(case["rows"].tolist()):
        p, n = int(case["prefix_lens"][i]), int(case["lens"][i])
        table[row, :p] = case["prefixes"][i][:p].cpu()
        table[row, p : p + n] = case["rest"][at : at + n].cpu()
        at += n
    return table


@pytest.mark.parametrize("rows", [1, 3, 40, 41, 168, 169, 900])
def test_rows_are_what_indexing_writes(pool: pystage.StagingPool, rows: int) -> None:
    case = rows_case(random.Random(rows), str(pool.device), rows)
    expected = written(case)
    assert _C.write_rows(pool._handle, *case.values()) is True
    assert torch.equal(case["table"].cpu(), expected)


def test_lists_that_shrink_while_they_are_read(pool: pystage.StagingPool) -> None:
    class Shrinks(torch.Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl

        @classmethod
        def __torch_dispatch__(cls, *_args: Any, **_kwargs: Any) -> torch.Tensor:
            dtypes.clear()
            return torch.zeros(4, dtype=torch.int64)

    dtypes = [torch.int32, *[torch.int64] * 4000]
    values = [torch.arange(4).as_subclass(Shrinks), *[[1]] * 4000]
    with pytest.raises(pystage.PystageError, match="shrank while they were read"):
        pool.small_tensors(values, dtypes)
    assert pool.small_tensors([[7]], [torch.int64])[0].tolist() == [7]

    class Sized(torch.Tensor):
        @staticmethod
        def __new__(cls) -> Sized:
            return torch.Tensor._make_wrapper_subclass(
                cls, (4,), dtype=torch.int64, dispatch_sizes_strides_policy="sizes"
            )

        @classmethod
        def __torch_dispatch__(cls, function: Any, *_args: Any, **_kwargs: Any) -> Any:
            prefixes.clear()
            return 4 if "numel" in str(function) else (4,)

    prefixes: list[torch.Tensor] = [Sized(), *[torch.arange(4)] * 500]
    count, none = len(prefixes), torch.zeros(501, dtype=torch.int64)
    table = torch.zeros(count, 8, dtype=torch.int32, device=pool.device)
    rest = torch.arange(8, device=pool.device)
    with pytest.raises(pystage.PystageError, match="prefixes shrank"):
        _C.write_rows(pool._handle, table, rest, prefixes, torch.arange(count), none, none)


def test_prefixes_that_go_while_they_are_copied(pool: pystage.StagingPool) -> None:
    """The host device copies without the GIL."""
    size, rows = 1 << 18, 40
    table = torch.zeros(rows, size, dtype=torch.int32, device=pool.device)
    for _ in range(3):
        prefixes = [torch.full((size,), 7, device=pool.device) for _ in range(rows)]
        thread = threading.Thread(target=prefixes.clear)
        lens = torch.full((rows,), size)
        arguments = (table, lens[:8].to(pool.device), prefixes, torch.arange(rows), lens, 0 * lens)
        thread.start()
        try:
            _C.write_rows(pool._handle, *arguments)
        except ValueError as error:  # it was faster
            assert "not as many prefixes" in str(error)
            table.fill_(7)
        thread.join()
        assert (table == 7).all()
        table.zero_()


def test_rows_that_do_not_fit_are_refused(pool: pystage.StagingPool) -> None:
    case = rows_case(random.Random(5), str(pool.device), 3)
    for name, i, value in (
        ("rows", 1, 6),
        ("rows", 0, -1),
        ("lens", 0, -1),
        ("prefix_lens", 2, 500),
        ("lens", 2, 10_000),
    ):
        bad = {**case, name: case[name].clone()}
        bad[name][i] = value
        before = bad["table"].clone()
        with pytest.raises(IndexError, match="does not fit a table of 6 x 700"):
            _C.write_rows(pool._handle, *bad.values())
        assert torch.equal(bad["table"], before)
    # Sums of the lengths that overflow.
    none, most = torch.empty(0, dtype=torch.int64, device=pool.device), (1 << 63) - 1
    one_id = torch.zeros(1, dtype=torch.int64, device=pool.device)
    table = torch.zeros(4, 64, dtype=torch.int32, device=pool.device)
    rest, lens = one_id.repeat(2), torch.tensor([1, most, 60])
    rows, before = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 0])
    with pytest.raises(IndexError, match=f"with 1 and {most} entries"):
        _C.write_rows(pool._handle, table, rest, [none, one_id, none], rows, before, lens)
    assert not table.any()
    # As long as the table is wide, and as many as there are, and one more of each.
    table = torch.full((1, 8), -1, dtype=torch.int32, device=pool.device)
    rest, prefix = (torch.arange(20, device=pool.device) for _ in range(2))
    one = [torch.tensor([n]) for n in range(10)]
    assert _C.write_rows(pool._handle, table, rest, [prefix], one[0], one[3], one[5])
    with pytest.raises(IndexError, match="with 3 and 6 entries"):
        _C.write_rows(pool._handle, table, rest, [prefix], one[0], one[3], one[6])
    assert _C.write_rows(pool._handle, table, rest[:5], [prefix], one[0], one[3], one[5])
    with pytest.raises(IndexError, match="and 4 new entries"):
        _C.write_rows(pool._handle, table, rest[:4], [prefix], one[0], one[3], one[5])
    with pytest.raises(ValueError, match="3 rows, but not as many"):
        _C.write_rows(pool._handle, *{**case, "prefixes": case["prefixes"][:2]}.values())
    with pytest.raises(TypeError, match="rows is a list"):
        _C.write_rows(pool._handle, *{**case, "rows": [1, 2, 3]}.values())


def test_rows_that_one_launch_cannot_write_are_left(pool: pystage.StagingPool) -> None:
    case = rows_case(random.Random(6), str(pool.device), 3)
    wide = {**case, "table": case["table"].long()}
    assert _C.write_rows(pool._handle, *wide.values()) is False
    strided = {**case, "rest": case["rest"].repeat_interleave(2)[::2]}
    assert _C.write_rows(pool._handle, *strided.values()) is False
    many = rows_case(random.Random(7), str(pool.device), 1500)
    assert _C.write_rows(pool._handle, *many.values()) is False
    assert (many["table"] == -1).all() and (wide["table"] == -1).all()


# --- known code ----------------------------------------------------------------------------------

tensor = torch.tensor


def known(device: Any, lists: Any, **more: Any) -> list[torch.Tensor]:
    return [torch.tensor(x, dtype=d, **more).to(device, non_blocking=True) for x, d in lists]


def made_at_once(device: Any, values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def unknown(device: Any, values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)


def codes() -> tuple[Any, ...]:
    from pystage.integrations.sglang.small import codes_of

    return codes_of(known, made_at_once)


class Through:
    """torch.tensor through a parcel."""

    def __init__(self, pool: pystage.StagingPool, *deliver_at: int, capacity: int = 4096) -> None:
        self.device = str(pool.device)
        self.minus_one = tensor([-1], device=self.device)
        groups = (codes(),) * len(deliver_at)
        self.parcel = _C.parcel(
            pool._handle, capacity, self.device, tensor, groups, deliver_at, self.minus_one
        )

    def __enter__(self) -> Through:
        torch.tensor = self.parcel.tensor  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        torch.tensor = tensor
        self.made = self.parcel.end()


THREE = [([1, 2, 3], torch.int64), ([4, 5, 6], torch.int32), ([0.5, 1], torch.float32)]


def of_one_storage(*tensors: torch.Tensor) -> bool:
    return len({t.untyped_storage().data_ptr() for t in tensors}) == 1


def test_known_code_gets_parts_of_one_parcel(pool: pystage.StagingPool) -> None:
    with Through(pool, 3) as through:
        made = known(through.device, THREE)
        # The third is the last of its group: all are there.
        assert [t.tolist() for t in made] == [[1, 2, 3], [4, 5, 6], [0.5, 1.0]]
        assert [t.dtype for t in made] == [d for _, d in THREE]
        assert of_one_storage(*made)
        more = known(through.device, THREE[:1])  # the parcel has ended
        assert more[0].tolist() == [1, 2, 3] and not of_one_storage(made[0], more[0])
    assert through.made == 3


def test_none_is_delivered_before_the_last_of_its_group(pool: pystage.StagingPool) -> None:
    with Through(pool, 2, 3) as through:
        (first,) = known(through.device, THREE[:1])
        if pool.device.type == "cpu":  # there the bytes show it
            assert first.tolist() != [1, 2, 3]
        (second,) = known(through.device, THREE[1:2])
        assert first.tolist() == [1, 2, 3] and second.tolist() == [4, 5, 6]
        (third,) = known(through.device, THREE[2:])
    assert third.tolist() == [0.5, 1.0] and of_one_storage(first, second, third)


def test_a_group_is_made_by_its_own_code(pool: pystage.StagingPool) -> None:
    """What other code makes beside it is read at once, perhaps with what is delivered."""
    device = str(pool.device)
    first, second = (
        compile(
            "made = torch.tensor([n, n], dtype=torch.int64).to(device, non_blocking=True)",
            n,
            "exec",
        )
        for n in ("first", "second")
    )

    def make(code: Any, n: int) -> torch.Tensor:
        names: dict[str, Any] = {"torch": torch, "device": device, "n": n}
        exec(code, names)
        made: torch.Tensor = names["made"]
        return made

    parcel = _C.parcel(pool._handle, 4096, device, tensor, ((first,), (second,)), (1, 3), None)
    torch.tensor = parcel.tensor  # type: ignore[assignment]
    try:
        early = make(second, 5)  # not its turn yet
        delivered = make(first, 1)
        read_at_once = make(first, 7)  # its turn is over
        assert [t.tolist() for t in (early, delivered, read_at_once)] == [[5] * 2, [1] * 2, [7] * 2]
        last = [make(second, n) for n in (2, 3)]
    finally:
        torch.tensor = tensor
    assert parcel.end() == 3 and [t.tolist() for t in last] == [[2, 2], [3, 3]]
    assert of_one_storage(delivered, *last) and not of_one_storage(delivered, read_at_once)


def test_what_is_sent_after_the_last_group_is_torchs(pool: pystage.StagingPool) -> None:
    device = str(pool.device)
    text = "hosts = [torch.tensor([n, n], dtype=torch.int64) for n in (1, 2)]"
    code = compile(text, "<test>", "exec")
    parcel = _C.parcel(pool._handle, 4096, device, tensor, (within(code),), (1,), None)
    names: dict[str, Any] = {"torch": torch}
    torch.tensor = parcel.tensor  # type: ignore[assignment]
    try:
        exec(code, names)
        first, second = (host.to(device, non_blocking=True) for host in names["hosts"])
    finally:
        torch.tensor = tensor
    assert first.tolist() == [1, 1] and second.tolist() == [2, 2]
    assert parcel.end() == 1


def test_the_end_delivers_what_is_left(pool: pystage.StagingPool) -> None:
    with Through(pool, 5) as through:
        made = known(through.device, THREE)
    assert [t.tolist() for t in made] == [[1, 2, 3], [4, 5, 6], [0.5, 1.0]]
    assert through.made == 3


def test_the_cpu_tensor_is_torchs_own(pool: pystage.StagingPool) -> None:
    with Through(pool, 2) as through:
        code = "host = torch.tensor([7, 8], dtype=torch.int64, pin_memory=False)"
        assert through.parcel.tensor([7, 8], dtype=torch.int64).__dict__ == {}  # unknown code
        names: dict[str, Any] = {"torch": torch}
        known_too = compile(code, "<test>", "exec")
        parcel = _C.parcel(
            pool._handle, 64, through.device, tensor, ((known_too,),), (2,), through.minus_one
        )
        torch.tensor = parcel.tensor  # type: ignore[assignment]
        exec(known_too, names)
    host = names["host"]
    assert "to" in host.__dict__
    parcel.end()
    assert host.__dict__ == {} and type(host) is torch.Tensor
    assert host.tolist() == [7, 8] and host.to(torch.float32).tolist() == [7.0, 8.0]


def test_unknown_code_and_other_threads_are_torchs(pool: pystage.StagingPool) -> None:
    found: list[torch.Tensor] = []
    with Through(pool, 3) as through:
        other = unknown(through.device, [9, 9])
        thread = threading.Thread(
            target=lambda: found.extend(
                [*known(through.device, THREE), made_at_once(through.device, [8.0])]
            )
        )
        thread.start()
        thread.join()
        made = known(through.device, THREE)
    assert other.tolist() == [9, 9]
    assert [t.tolist() for t in found] == [*(t.tolist() for t in made), [8.0]]
    assert not of_one_storage(*found) and of_one_storage(*made) and through.made == 3


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1.7, 2.2], torch.int64),  # torch cuts them off
        ([2, 3], torch.float16),
        ([2, 3], torch.bool),
        ([[1, 2], [3, 4]], torch.int64),
        ((1, 2), torch.int64),
    ],
)
def test_what_torch_reads_otherwise_is_torchs(
    pool: pystage.StagingPool, values: Any, dtype: torch.dtype
) -> None:
    with Through(pool, 3) as through:
        (first,) = known(through.device, THREE[:1])
        (other,) = known(through.device, [(values, dtype)])
        expected = tensor(values, dtype=dtype)
        assert torch.equal(other.cpu(), expected)
        if isinstance(values, list):  # nobody knows what comes next: what there is is delivered
            assert first.tolist() == [1, 2, 3]
    assert first.tolist() == [1, 2, 3]


def test_what_torch_refuses_is_refused(pool: pystage.StagingPool) -> None:
    with Through(pool, 3) as through:
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            known(through.device, [(["a"], torch.int64)])
        with pytest.raises(TypeError, match="nonsense"):
            known(through.device, THREE, nonsense=1)
    assert through.made == 0


def test_another_to_is_torchs(pool: pystage.StagingPool) -> None:
    with Through(pool, 3) as through:
        (first,) = known(through.device, THREE[:1])
        (wide,) = known(torch.float64, [([1, 2], torch.int64)])
        assert wide.dtype == torch.float64 and wide.tolist() == [1.0, 2.0]
        assert first.tolist() == [1, 2, 3]


def test_without_room_it_is_torchs(pool: pystage.StagingPool) -> None:
    with Through(pool, 3, capacity=32) as through:
        made = known(through.device, [([1, 2, 3], torch.int64), ([4, 5, 6], torch.int64)])
    assert [t.tolist() for t in made] == [[1, 2, 3], [4, 5, 6]]


def test_straight_to_the_device(pool: pystage.StagingPool) -> None:
    with Through(pool, 2) as through:
        made = [made_at_once(through.device, [0.25, n]) for n in (1, 2)]
        assert [t.tolist() for t in made] == [[0.25, 1.0], [0.25, 2.0]] and of_one_storage(*made)


def within(code: Any) -> tuple[Any, ...]:
    from pystage.integrations.sglang.small import codes_of

    return codes_of(SimpleNamespace(__code__=code))


def test_the_one_minus_one(pool: pystage.StagingPool) -> None:
    text = "made, other = (torch.tensor([n], device=device) for n in (-1, 5))"
    code = compile(text, "<test>", "exec")
    with Through(pool, 2) as through:
        unknown_code = through.parcel.tensor([-1], device=through.device)
        assert unknown_code is not through.minus_one and unknown_code.tolist() == [-1]
        names: dict[str, Any] = {"torch": torch, "device": through.device}
        parcel = _C.parcel(
            pool._handle, 64, through.device, tensor, (within(code),), (2,), through.minus_one
        )
        torch.tensor = parcel.tensor  # type: ignore[assignment]
        exec(code, names)
        assert names["made"] is through.minus_one and names["other"].tolist() == [5]
        parcel.end()


def test_an_int_beyond_a_c_long_is_torchs(pool: pystage.StagingPool) -> None:
    text = "torch.tensor([1 << 70], device=device)"
    code = compile(text, "<test>", "exec")
    for original in (True, False):
        parcel = _C.parcel(
            pool._handle, 64, str(pool.device), tensor, (within(code),), (2,), torch.tensor([-1])
        )
        made = SimpleNamespace(tensor=tensor if original else parcel.tensor)
        with pytest.raises((ValueError, RuntimeError), match="Overflow"):
            exec(code, {"torch": made, "device": str(pool.device)})
        parcel.end()


def test_the_scope_puts_torch_back(pool: pystage.StagingPool) -> None:
    from pystage.integrations.sglang.small import MinusOne, Scope, codes_of

    full, once = torch.full, MinusOne()
    device = str(pool.device)
    minus_one = once.on(device, pool)
    assert minus_one.tolist() == [-1] and once.on(device, pool) is minus_one

    def fills(device: str, value: int) -> list[torch.Tensor]:
        return [torch.full((1,), value, device=device) for _ in range(3)]

    scope = Scope(pool, device, (codes_of(fills), ()), 8, (5, 9), minus_one)
    assert torch.tensor is not tensor
    assert all(t is minus_one for t in fills(device, -1))
    assert all(t is not minus_one and t.tolist() == [2] for t in fills(device, 2))
    assert torch.full((1,), -1, device=device) is not minus_one  # unknown code
    # A second one, of any thread, would leave the first's tensors undelivered.
    with pytest.raises(pystage.PystageError, match="another thread"):
        Scope(pool, device, (codes_of(fills),), 8, (2,), minus_one)
    assert torch.tensor is not tensor
    scope.close()
    assert torch.tensor is tensor and torch.full is full
    with pytest.raises(TypeError, match="must be tuples"):
        Scope(pool, device, [], 8, (2,), minus_one)  # type: ignore[arg-type]
    assert torch.tensor is tensor
    Scope(pool, device, (codes_of(fills),), 8, (2,), minus_one).close()
