"""The process that owns an engine: python -m bench.engine.worker SOCKET

It carries out the commands that it reads from the socket.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import socket
import sys
import time
from collections.abc import AsyncIterator
from multiprocessing.connection import Client
from typing import Any

ONE_TOKEN = {"temperature": 0.0, "max_new_tokens": 1, "ignore_eos": True}
BESIDE_S = 0.002  # delay from a load-back to the arrival of the fresh prompt
FREED_S = 60.0  # a starved request must end this long after the copies have stopped


def control(op: str, ranks: int = 1, **given: Any) -> dict[str, Any]:
    """Sends a command to ``inside`` in each scheduler process. There is one on each GPU.

    Returns:
        The answer of the first GPU's process. Copies and traces are of the first GPU alone. A
        bypass applies to all of them, and the numbers of staged batches are summed.
    """
    answers = [_ask(rank, op, **given) for rank in range(ranks if op == "bypass" else 1)]
    if op == "bypass":
        return {"stages": sum(answer["stages"] for answer in answers)}
    return answers[0]


def _ask(rank: int, op: str, **given: Any) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.settimeout(60)
        _connect(link, f"{os.environ['PYSTAGE_ENGINE_CONTROL']}.{rank}")
        with link.makefile("rw") as file:
            file.write(json.dumps({"op": op, **given}) + "\n")
            file.flush()
            answer: dict[str, Any] = json.loads(file.readline())
    if "error" in answer:
        raise RuntimeError(f"in the scheduler of rank {rank}: {answer['error']}")
    return answer


def _connect(link: socket.socket, path: str) -> None:
    """Connects. An engine is up before all of its schedulers listen, so this waits for them."""
    end = time.monotonic() + 60
    while True:
        try:
            return link.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def on_device(details: Any) -> int | None:
    """The cached tokens that were on the device, as far as this release of SGLang tells."""
    return details.get("device") if isinstance(details, dict) else None


class Worker:
    def __init__(self, model: str, engine: dict[str, Any]) -> None:
        from sglang.srt.entrypoints.engine import Engine

        self.ranks = engine.get("tp_size", 1) * engine.get("pp_size", 1)
        self.engine = Engine(
            model_path=model,
            load_format="dummy",
            skip_tokenizer_init=True,
            sampling_backend="pytorch",
            grammar_backend="none",
            disable_cuda_graph=True,
            random_seed=1,
            log_level="info",
            enable_cache_report=True,
            watchdog_timeout=600,
            **engine,
        )

    async def _one(self, ids: list[int], tokens: int, wait: float) -> dict[str, Any]:
        if wait > 0:
            await asyncio.sleep(wait)
        begun, times = time.perf_counter(), []
        params = {**ONE_TOKEN, "max_new_tokens": tokens}
        stream = tokens > 1
        answer = await self.engine.async_generate(
            input_ids=ids, sampling_params=params, stream=stream
        )
        if stream:
            parts: AsyncIterator[dict[str, Any]] = answer
            async for part in parts:
                times.append(time.perf_counter())
                answer = part
        else:
            times.append(time.perf_counter())
        return {
            "ttft_ms": 1e3 * (times[0] - begun),
            "itl_ms": [1e3 * (b - a) for a, b in itertools.pairwise(times)],
            "out": list(answer["output_ids"]),
            "cached": answer["meta_info"].get("cached_tokens"),
            "cached_on_device": on_device(answer["meta_info"].get("cached_tokens_details")),
        }

    async def _patiently(self, requests: list[Any], patience: float) -> list[dict[str, Any]]:
        """Waits for the answers. Requests that take longer than ``patience`` have starved: then the
        copies are stopped, so that the engine can go on. Their answers say when they ended."""
        begun = time.perf_counter()
        tasks = [asyncio.ensure_future(request) for request in requests]
        _, late = await asyncio.wait(tasks, timeout=patience)
        if late:
            control("traffic", on=False)
            _, lost = await asyncio.wait(late, timeout=FREED_S)
            if lost:
                raise TimeoutError(f"no answer {FREED_S:.0f} s after the copies were stopped")
        took = time.perf_counter() - begun
        return [
            {**task.result(), "starved_s": patience, "freed_after_s": round(took, 3)}
            if task in late
            else task.result()
            for task in tasks
        ]

    def closed(self, groups: list[list[list[int]]], gap: float, patience: float) -> dict[str, Any]:
        """Sends one group of requests at a time and reports the last request of each group. Stops
        when a request has starved."""
        told, begun = [], time.perf_counter()
        for group in groups:
            time.sleep(gap)
            requests = [self._one(ids, 1, i * BESIDE_S) for i, ids in enumerate(group)]
            answers = self.engine.loop.run_until_complete(self._patiently(requests, patience))
            told.append(answers[-1])
            if any("starved_s" in answer for answer in answers):
                break
        return {"samples": told, "seconds": time.perf_counter() - begun}

    def open(
        self, prompts: list[list[int]], at: list[float], tokens: int, patience: float
    ) -> dict[str, Any]:
        """Sends requests at their arrival times, independent of the engine's progress."""
        begun = time.perf_counter()
        requests = [self._one(ids, tokens, t) for ids, t in zip(prompts, at, strict=True)]
        told = self.engine.loop.run_until_complete(self._patiently(requests, at[-1] + patience))
        return {"samples": told, "seconds": time.perf_counter() - begun}

    def logprobs(self, prompts: list[list[int]]) -> dict[str, Any]:
        """The log probability of each id of the prompts, given the ids before it."""
        told = []
        for ids in prompts:
            answer = self.engine.generate(
                input_ids=ids,
                sampling_params=ONE_TOKEN,
                return_logprob=True,
                logprob_start_len=0,
            )
            told.append([x[0] for x in answer["meta_info"]["input_token_logprobs"]])
        return {"logprobs": told}

    def control(self, command: dict[str, Any]) -> dict[str, Any]:
        return control(**command, ranks=self.ranks)


def main(address: str) -> None:
    with Client(address, "AF_UNIX") as channel:
        begun = time.perf_counter()
        try:
            worker = Worker(**channel.recv())
        except BaseException as error:
            channel.send({"error": repr(error)})
            raise
        channel.send({"seconds": time.perf_counter() - begun})
        gc.collect()
        gc.freeze()
        try:
            while (command := channel.recv()) is not None:
                gc.disable()  # for all variants alike: the collector runs between blocks
                try:
                    answer = getattr(worker, command.pop("op"))(**command)
                except Exception as error:
                    answer = {"error": repr(error)}
                gc.enable()
                gc.collect()
                channel.send(answer)
        finally:
            worker.engine.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
