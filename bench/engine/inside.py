"""An SGLang plugin that serves the experiment's commands inside the scheduler's process.

While tracing is off, none of its code is on the path of a request. A thread listens on the Unix
socket ``$PYSTAGE_ENGINE_CONTROL.N``, where N is the number of its GPU. It reads one JSON object per
line:

``traffic``   copies beside the forwards, from a C loop without the GIL      {"on", "mib", ...}
``bypass``    takes pystage's pool away from its hooks, or gives it back     {"on"}
``trace``     records events around the parts of a prefill                   {"on"}
``stats``     what runs here: versions, plugin, pools
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from bench.copies import Copies
from bench.device import HostEvent
from bench.llama import draw_weights

logger = logging.getLogger("pystage.engine")


def plugin() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for name, hook in (
        ("sglang.srt.managers.scheduler.Scheduler.run_event_loop", _run_event_loop),
        ("sglang.srt.model_loader.weight_utils.initialize_dummy_weights", _weights),
    ):
        HookRegistry.register(name, hook, HookType.AROUND)


def _weights(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> None:
    draw_weights(model)


def _run_event_loop(
    original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any
) -> None:
    gpu = getattr(scheduler.tp_worker.model_runner, "gpu_id", 0)  # of this rank
    control = Control(scheduler, f"{os.environ['PYSTAGE_ENGINE_CONTROL']}.{gpu}")
    threading.Thread(target=control.serve, daemon=True).start()
    original(scheduler, *args, **kwargs)


class Control:
    def __init__(self, scheduler: Any, path: str) -> None:
        import torch

        self.scheduler = scheduler
        self.cuda = torch.device(scheduler.tp_worker.model_runner.device).type == "cuda"
        self.device = torch.cuda.current_device() if self.cuda else -1
        self.traffic = Copies(self.device, Path(os.environ["PYSTAGE_ENGINE_TRAFFIC"]))
        self.trace = Trace(scheduler, self.cuda)
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(path)
        self._server.listen()

    def serve(self) -> None:
        if self.cuda:
            import torch

            torch.cuda.set_device(self.device)
        while True:
            connection, _ = self._server.accept()
            with connection, connection.makefile("rw") as file:
                for text in file:
                    try:
                        answer = self.answer(**json.loads(text))
                    except Exception as error:
                        logger.exception("pystage.engine: %s", text)
                        answer = {"error": repr(error)}
                    file.write(json.dumps(answer) + "\n")
                    file.flush()

    def answer(self, op: str, **given: Any) -> dict[str, Any]:
        if op == "traffic":
            if given.pop("on"):
                self.traffic.start(**given)
                return {}
            return {"gb_per_s": self.traffic.stop()}
        if op == "trace":
            return self.trace.start() if given["on"] else self.trace.stop()
        if op == "bypass":
            return self.bypass(given["on"])
        return self.stats()

    def bypass(self, on: bool) -> dict[str, Any]:
        """Disables or enables the pool. Without a pool the hooks leave each batch to SGLang, so the
        same process runs without pystage."""
        module = sys.modules["pystage.integrations.sglang"]
        if on:
            module.process.pools.of = lambda device: None  # type: ignore[method-assign]
        else:
            vars(module.process.pools).pop("of", None)
        return {"stages": sum(stats.stages for stats in module.pool_stats())}

    def stats(self) -> dict[str, Any]:
        import torch

        versions = {}
        for name in ("sglang", "torch", "transformers", "triton", "sglang-kernel"):
            try:
                versions[name] = version(name)
            except PackageNotFoundError:
                versions[name] = "not installed"
        scheduler, runner = self.scheduler, self.scheduler.tp_worker.model_runner
        told = {
            "versions": versions,
            "plugins": sorted(p.name for p in entry_points(group="sglang.srt.plugins")),
            "device": torch.cuda.get_device_name() if self.cuda else "cpu",
            "max_total_tokens": scheduler.max_total_num_tokens,
            "attention": type(getattr(runner, "attn_backend", None)).__name__,
            "tree_cache": type(scheduler.tree_cache).__name__,
            "stand_ins": sys.modules["bench.in_sglang.stand_ins"].STOOD_IN,
        }
        module = sys.modules.get("pystage.integrations.sglang")
        if module is not None:
            told["pystage"] = module.status()
        controller = getattr(scheduler.tree_cache, "cache_controller", None)
        if controller is not None:
            told["hicache"] = controller.io_backend
        return told


# --- trace --------------------------------------------------------------------------------------


class Trace:
    """Times at which the parts of a prefill begin and end, on the host and on their stream:

    ``prepare``, ``prepared``  schedule stream, around ``prepare_for_extend``
    ``resolve``, ``ids``       forward stream, around ``resolve_forward_inputs``
    ``forward``, ``end``       forward stream: the model's forward begins; the batch's work is done
    """

    def __init__(self, scheduler: Any, cuda: bool) -> None:
        self._scheduler, self._cuda = scheduler, cuda
        self._replaced: list[tuple[Any, str, Any]] = []
        self._batches: list[dict[str, Any]] = []
        self._current: dict[str, Any] | None = None

    def _mark(self, name: str, stream: Any = None) -> None:
        if self._current is None:
            return
        if self._cuda:
            import torch

            event: Any = torch.cuda.Event(enable_timing=True)
        else:
            event = HostEvent()
        event.record(*([] if stream is None else [stream]))
        self._current[name] = event, time.perf_counter()

    def _around(self, owner: Any, name: str, before: str | None, after: str | None) -> None:
        original = getattr(owner, name)

        def marked(*args: Any, **kwargs: Any) -> Any:
            if before == "prepare":
                self._current = {}
            if before is not None:
                self._mark(before)
            result = original(*args, **kwargs)
            if after == "end" and self._current is not None:
                self._mark("end", self._scheduler.forward_stream if self._cuda else None)
                self._batches.append(self._current)
                self._current = None
            elif after is not None:
                self._mark(after)
            return result

        self._replaced.append((owner, name, original))
        setattr(owner, name, marked)

    def start(self) -> dict[str, Any]:
        from sglang.srt.managers import schedule_batch, scheduler
        from sglang.srt.model_executor import model_runner

        self._batches, self._current = [], None
        self._around(schedule_batch.ScheduleBatch, "prepare_for_extend", "prepare", "prepared")
        self._around(scheduler, "resolve_forward_inputs", "resolve", "ids")
        self._around(model_runner.ModelRunner, "forward", "forward", None)
        self._around(scheduler.Scheduler, "run_batch", None, "end")
        return {}

    def stop(self) -> dict[str, Any]:
        while self._replaced:
            owner, name, original = self._replaced.pop()
            setattr(owner, name, original)
        rows = []
        for batch in self._batches:
            if not {"prepare", "end"} <= batch.keys():
                continue
            batch["end"][0].synchronize()
            first, at = batch["prepare"]
            row: dict[str, float] = {}
            for name in ("prepared", "resolve", "ids", "forward", "end"):
                if name in batch:
                    event, when = batch[name]
                    row[f"device_{name}_ms"] = first.elapsed_time(event)
                    row[f"host_{name}_ms"] = 1e3 * (when - at)
            rows.append(row)
        return {"batches": rows}
