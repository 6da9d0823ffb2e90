"""Runs two engines at a time and sends requests to them in turn.

"off" is an engine without the plugin (PYSTAGE_SGLANG=0), "on" is one with it. "bypassed" is the
process of "on" with its pool disabled, and with other prompts of the same lengths. Differences
between "off" and "bypassed" come from the two processes. Differences between "bypassed" and "on" do
not.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

from bench.compiled import compiled
from bench.engine.plans import Plan, Workload, poisson
from bench.engine.tables import VARIANTS, line, row_of, trace_row
from bench.llama import write_config
from pystage.trace import sample_trace

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = ("vllm._custom_ops", "torchvision", "xgrammar")  # imported, never called; vllm on a CPU
ANSWER_S = 90.0  # in addition to a block's own patience
LEAD = 256  # ids of an extra request before each block, not counted: its process was idle


class EngineFailed(RuntimeError):
    """An engine did not start, ended, or did not answer in time. The message has the end of its
    log."""


class OutOfTime(Exception):
    """The run has used up its time limit."""


# --- what both engines need -----------------------------------------------------------------------


def prepare(folder: Path, plan: Plan) -> None:
    """Writes to ``folder`` the model's configuration, the copy loop, and a package. The package
    makes SGLang load ``inside`` as a plugin and replaces kernels that are not installed with
    stubs."""
    site = folder / "site"
    metadata = site / "pystage_engine_bench-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: pystage-engine-bench\nVersion: 0\n"
    )
    (metadata / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\npystage_engine = bench.engine.inside:plugin\n"
    )
    packages = STAND_IN if plan.engine["device"] == "cpu" else STAND_IN[1:]
    (site / "sitecustomize.py").write_text(
        f"from bench.in_sglang.stand_ins import stand_in\nstand_in({packages!r})\n"
    )
    write_config(folder / "model", plan.model)
    compiled("copies.c", folder)


def other_models() -> str:
    """All of SGLang's models except the one used. Importing them would take most of the start."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "SGLang is not installed here: run this in SGLang's environment "
            "(on a CPU: make sglang-env, then .venv-sglang/bin/python -m bench.engine --plan tiny)"
        )
    models = Path(next(iter(spec.submodule_search_locations))) / "srt/models"
    keep = {"llama", "registry", "__init__"}
    return ",".join(sorted(p.stem for p in models.glob("*.py") if p.stem not in keep))


class Side:
    """An engine's process and the connection to it."""

    def __init__(self, name: str, plan: Plan, folder: Path, logs: Path, deadline: float) -> None:
        self.name, self._deadline = name, deadline
        self._log = logs / f"engine-{name}.log"
        socket = folder / f"{name}.sock"
        path = [str(folder / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p for p in path if p),
            "PYSTAGE_SGLANG": "1" if name == "on" else "0",
            "PYSTAGE_ENGINE_CONTROL": str(folder / f"{name}.control"),
            "PYSTAGE_ENGINE_TRAFFIC": str(folder / "copies.so"),
            "SGLANG_DISABLED_MODEL_ARCHS": other_models(),
            "PYTHONUNBUFFERED": "1",
            **plan.environment,
        }
        self._listener = Listener(str(socket), "AF_UNIX")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.engine.worker", str(socket)],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._channel: Connection | None = None
        self._setup = {"model": str(folder / "model"), "engine": dict(plan.engine)}

    def connect(self, port: int) -> None:
        self._listener._listener._socket.settimeout(1)  # type: ignore[attr-defined]
        while self._channel is None:
            try:
                self._channel = self._listener.accept()
            except TimeoutError:
                self._alive()
        self._setup["engine"]["nccl_port"] = port  # two started at once would choose the same
        self._channel.send(self._setup)

    def _alive(self) -> None:
        if self._process.poll() is not None:
            raise EngineFailed(
                f"{self.name}: ended with status {self._process.returncode}\n{self.tail()}"
            )
        if time.monotonic() > self._deadline:
            raise OutOfTime

    def receive(self, seconds: float) -> dict[str, Any]:
        assert self._channel is not None
        end = time.monotonic() + seconds
        while not self._channel.poll(0.2):
            self._alive()
            if time.monotonic() > end:
                raise EngineFailed(f"{self.name}: no answer in {seconds:.0f} s\n{self.tail()}")
        try:
            answer: dict[str, Any] = self._channel.recv()
        except EOFError:  # the process has closed its end: it has ended or is about to
            self._process.wait()
            self._alive()
            raise
        if "error" in answer:
            raise EngineFailed(f"{self.name}: {answer['error']}\n{self.tail()}")
        return answer

    def ask(self, op: str, seconds: float = ANSWER_S, **given: Any) -> dict[str, Any]:
        assert self._channel is not None
        self._channel.send({"op": op, **given})
        return self.receive(seconds)

    def pause(self, on: bool) -> None:
        """Stops or continues the engine's processes. When idle, they poll all the time, on cores
        that the other engine needs."""
        os.killpg(self._process.pid, signal.SIGSTOP if on else signal.SIGCONT)

    def tell(self, **command: Any) -> dict[str, Any]:
        return self.ask("control", command=command)

    def tail(self, lines: int = 25) -> str:
        """The last lines of its log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])

    def close(self, gently: bool) -> None:
        """Ends it and all processes that it started. Does not wait for an engine that failed."""
        if self._channel is not None and gently:
            with contextlib.suppress(OSError):  # it has ended already
                self._channel.send(None)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its session
        self._process.wait()
        if self._channel is not None:
            self._channel.close()
        self._listener.close()


# --- the experiment -------------------------------------------------------------------------------


class Experiment:
    """Runs one plan. ``scale`` multiplies the number of blocks. ``seconds`` is the time limit."""

    def __init__(
        self, plan: Plan, logs: Path, seconds: float, scale: float, say: Callable[[str], None]
    ) -> None:
        self._plan, self._logs, self._scale, self._say = plan, logs, scale, say
        self._deadline = time.monotonic() + seconds
        self._dice = random.Random(7)
        vocabulary = plan.model["vocab_size"]
        self._span = (300, vocabulary - 300) if vocabulary > 10_000 else (3, vocabulary)
        self._turn = 0
        self._settled: str | None = None
        self.result: dict[str, Any] = {"about": plan.about, "rows": [], "traces": {}, "cut": []}

    def run(self) -> None:
        """Fills ``result``. It keeps what was measured before an engine failed or time ran out."""
        with tempfile.TemporaryDirectory(prefix="pystage-engine-") as name:
            folder = Path(name)
            prepare(folder, self._plan)
            self._logs.mkdir(parents=True, exist_ok=True)
            sides: list[Side] = []
            try:
                for side in ("off", "on"):
                    sides.append(Side(side, self._plan, folder, self._logs, self._deadline))
                for port, side in zip(_free_ports(len(sides)), sides, strict=True):
                    side.connect(port)
                self._measure(*sides)
            except OutOfTime:
                self.result["cut"].append("the run's time was over")
            except EngineFailed as error:
                self.result["cut"].append(str(error).partition("\n")[0])
                self._say(str(error))
            except BaseException as error:
                self.result["cut"].append(repr(error))
                raise
            finally:
                for side in sides:
                    side.close(gently=not self.result["cut"])

    def _measure(self, off: Side, on: Side) -> None:
        started = {side.name: side.receive(600)["seconds"] for side in (off, on)}
        self._say(f"both engines are up, in {max(started.values()):.0f} s")
        self._histories = [self._ids(self._plan.history) for _ in range(self._plan.conversations)]
        sizes = sorted({w.new for w in self._plan.workloads if w.kind == "prompt"})
        warm = [[self._ids(n)] for n in (LEAD, *sizes) for _ in range(2)]
        decoded = [self._ids(LEAD) for _ in range(3)]  # decode uses different kernels
        check = [self._ids(min(700, self._plan.engine["context_length"] // 2)) for _ in range(2)]
        found = []
        for side in (off, on):
            side.ask("closed", 300, groups=warm, gap=0.0, patience=240.0)
            side.ask("open", 300, prompts=decoded, at=[0.0, 0.0, 0.1], tokens=8, patience=240.0)
            self.result.setdefault("engines", {})[side.name] = side.tell(op="stats")
            found.append(side.ask("logprobs", prompts=check)["logprobs"])
        self.result["logprobs"] = {
            "ids": sum(map(len, check)),
            "equal": found[0] == found[1],
            "largest_difference": max(
                abs(a - b)
                for x, y in zip(*found, strict=True)
                for a, b in zip(x, y, strict=True)
                if a is not None
            ),
        }
        for workload in self._plan.workloads:
            samples = self._workload(workload, off, on)
            if samples["off"] and samples["on"]:
                row = row_of(workload.name, samples, self._plan.same_chunks)
                self.result["rows"].append(row)
                self._say(line(row))
            if workload.traced:
                self._trace(workload, off, on)
        self.result["sizing"] = on.tell(op="stats")["pystage"]["sizing"]

    def _workload(self, workload: Workload, off: Side, on: Side) -> dict[str, Any]:
        found: dict[str, Any] = {variant: [] for variant in VARIANTS}
        found |= {"seconds": {v: [] for v in VARIANTS}, "stages": {"on": 0, "bypassed": 0}}
        rates: list[float] = []
        starved: set[str] = set()
        self._settle(workload, off, on)
        for block in range(max(1, round(workload.blocks * self._scale))):
            same = self._requests(workload)
            others = self._others(workload, same)
            turns = [("off", off, same), ("on", on, same), ("bypassed", on, others)]
            turns = turns[block % 3 :] + turns[: block % 3]
            for variant, side, requests in turns if block % 2 == 0 else turns[::-1]:
                if variant in starved:
                    continue  # one has starved, and the others would take as long
                other = off if side is on else on
                other.pause(True)
                before = side.tell(op="bypass", on=variant == "bypassed") if side is on else {}
                answer, rate = self._ask(side, workload, requests)
                if side is on:
                    after = side.tell(op="bypass", on=False)
                    found["stages"][variant] += after["stages"] - before["stages"]
                other.pause(False)
                found[variant].append(answer["samples"])
                found["seconds"][variant].append(answer["seconds"])
                if rate is not None:
                    rates.append(rate)
                if any("starved_s" in s for s in answer["samples"]):
                    starved.add(variant)
        found["traffic_gb_per_s"] = round(sum(rates) / len(rates), 2) if rates else None
        return found

    def _ask(
        self, side: Side, workload: Workload, requests: dict[str, Any]
    ) -> tuple[dict[str, Any], float | None]:
        """The times of the requests, and the rate of the copies beside them in GB/s."""
        patience = workload.patience_s
        with _traffic(side, workload) as ended:
            if workload.kind == "open":
                answer = side.ask("open", ANSWER_S + 6 * patience, **requests, patience=patience)
            else:
                requests = {**requests, "groups": [[self._ids(LEAD)], *requests["groups"]]}
                answer = side.ask(
                    "closed",
                    ANSWER_S + 3 * patience,
                    **requests,
                    gap=self._plan.gap_s,
                    patience=patience,
                )
                answer["samples"] = answer["samples"][1:] or answer["samples"]
        return answer, ended.get("gb_per_s")

    def _trace(self, workload: Workload, off: Side, on: Side) -> None:
        requests = self._requests(workload, workload.traced)
        traced: dict[str, Any] = {}
        for side in (off, on):
            side.tell(op="trace", on=True)
            try:
                self._ask(side, workload, requests)
            finally:
                traced[side.name] = trace_row(side.tell(op="trace", on=False)["batches"])
        self.result["traces"][workload.name] = traced

    # requests

    def _ids(self, count: int) -> list[int]:
        return [self._dice.randrange(*self._span) for _ in range(count)]

    def _settle(self, workload: Workload, off: Side, on: Side) -> None:
        """Runs the first turns of the conversations, so that they are cached, and with HiCache
        written to the host. Other prompts may evict them, so this runs before each workload of
        another kind."""
        if workload.kind not in ("chat", "loadback", "beside"):
            self._settled = None
            return
        kind = "chat" if workload.kind == "chat" else "host"
        if self._settled == kind:
            return
        self._settled = kind
        turns = [[history] for history in self._histories]
        if kind == "host":  # one round, so that the first one measured is loaded back
            turns += [[self._next_turn(workload.new)] for _ in self._histories]
        for side in (off, on):
            side.ask("closed", 300, groups=turns, gap=self._plan.gap_s, patience=240.0)

    def _next_turn(self, new: int) -> list[int]:
        self._turn += 1
        return self._histories[self._turn % len(self._histories)] + self._ids(new)

    def _others(self, workload: Workload, same: dict[str, Any]) -> dict[str, Any]:
        """Other prompts of the same lengths, and the same arrival times."""
        if workload.kind != "open":
            return self._requests(workload)
        return {**same, "prompts": [self._ids(len(prompt)) for prompt in same["prompts"]]}

    def _requests(self, workload: Workload, count: int = 0) -> dict[str, Any]:
        count = count or workload.count
        if workload.kind == "open":
            room = self._plan.engine["context_length"] - workload.tokens - 8
            room = min(room, self._plan.engine["max_total_tokens"] // 4)
            trace = sample_trace()
            lengths = [
                min(trace[self._dice.randrange(len(trace))].length, room) for _ in range(count)
            ]
            return {
                "prompts": [self._ids(n) for n in lengths],
                "at": poisson(workload.rate, count, self._dice),
                "tokens": workload.tokens,
            }
        if workload.kind == "prompt":
            groups = [[self._ids(workload.new)] for _ in range(count)]
        else:
            groups = [[self._next_turn(workload.new)] for _ in range(count)]
        if workload.kind == "beside":
            for group in groups:
                group.append(self._ids(workload.fresh))
        return {"groups": groups}


@contextlib.contextmanager
def _traffic(side: Side, workload: Workload) -> Iterator[dict[str, Any]]:
    """Runs copies during the block. Afterwards the yielded dict has their rate."""
    ended: dict[str, Any] = {}
    if workload.traffic is None:
        yield ended
        return
    side.tell(op="traffic", on=True, **vars(workload.traffic))
    try:
        yield ended
    finally:
        ended |= side.tell(op="traffic", on=False)


def _free_ports(count: int) -> list[int]:
    import socket

    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
