"""Logits in the real SGLang, with and without the plugin: python -m bench.in_sglang.logits

Runs batches of a trace, with shortened prompts, through a small Llama with random weights. It uses
SGLang's own prepare_for_extend, resolve_forward_inputs, ForwardBatch.init_new, forward and
sampling. Each batch runs with and without the plugin, on equal requests with separate rows and KV
memory. The model's logits, the logits used for sampling (with logit bias, penalties and a grammar's
mask) and the sampled ids must be equal, bit by bit. It also counts the kernels and copies that
init_new launches.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
import time
from itertools import cycle, islice
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from bench.common import write_result
from bench.device import launched
from bench.in_sglang import rig as sglang_rig
from bench.in_sglang.plugin import (
    SIDES,
    WITH,
    WITHOUT,
    Streams,
    Switch,
    load_plugin,
    recorder_of,
    sampling_of,
)
from pystage.trace import Request, draw_ids, prefill_batches, sample_trace

CHUNK, LONGEST, MOST = 512, 1500, 12  # tokens per batch and per prompt, requests per batch
VOCAB = sglang_rig.TINY_LLAMA["vocab_size"]
KINDS = {"logit_bias": "logit bias", "frequency_penalty": "penalties", "temperature": "sampling"}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


class Grammars:
    """Grammars for requests with a JSON schema, from SGLang's own backend over a vocabulary of
    bytes."""

    def __init__(self) -> None:
        import xgrammar
        from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend

        vocab = [bytes([i]) if i < 256 else f"<{i}>".encode() for i in range(VOCAB)]
        info = xgrammar.TokenizerInfo(vocab, xgrammar.VocabType.RAW, stop_token_ids=[2])

        class Tokenizer:
            def init_xgrammar(self) -> tuple[Any, None]:
                return info, None

        backend = XGrammarGrammarBackend(Tokenizer(), vocab_size=VOCAB)
        self._compiled = backend.dispatch_json(json.dumps(SCHEMA))

    def new(self) -> Any:
        return self._compiled.copy()


class Comparison:
    def __init__(self, device: str, grammars: Grammars | None, console: Console) -> None:
        self.rig = sglang_rig.Rig(
            device, model=True, overlap=True, max_total_tokens=1 << 16, max_running_requests=64
        )
        self.streams, self.grammars = Streams(device), grammars
        _, self.status = load_plugin()
        self.switch = Switch()
        self.live: dict[tuple[str, int], Any] = {}
        # Forwards read a batch's tensors on another stream than the one that made them. So the
        # tensors must not be freed before the forwards are done: the scheduler keeps two batches.
        self.record = recorder_of(console)
        self.kept = SimpleNamespace(batch_record_ct=0, batch_record_buf=[None] * 2)
        self.kinds = dict.fromkeys((*KINDS.values(), "logprobs", "grammar"), 0)

    def run(self, requests: list[Request], batches: int) -> dict[str, Any]:
        # which of a batch's requests differ, read back only now and then
        wrong = torch.zeros(batches, 3, MOST, dtype=torch.bool, device=self.rig.device)
        tokens, start, compared = 0, time.monotonic(), []
        work = islice(prefill_batches(cycle(requests), CHUNK, MOST), batches)
        for number, shape in enumerate(track(work, "logits", total=batches)):
            out = {side: self._batch(side, requests, shape) for side in SIDES}
            with self.streams.on_forward():
                for k, (a, b) in enumerate(zip(out[WITH], out[WITHOUT], strict=True)):
                    wrong[number, k, : len(a)] = (a != b).view(len(a), -1).any(1)
            tokens += shape.tokens
            compared.append(shape.requests)
            self.streams.settle()  # rows and KV memory are free only after all reads
            for r, stop in zip(shape.requests, shape.stops, strict=True):
                if stop == requests[r % len(requests)].length:
                    self.rig.release(*(self.live.pop((side, r)) for side in SIDES))
            if number % 200 == 199 and wrong.any():
                break
        self.streams.settle()
        names = ("logits", "sampled logits", "sampled ids")
        return {
            "batches": number + 1,
            "tokens": tokens,
            "different": dict(zip(names, wrong.any(2).sum(0).tolist(), strict=True)),
            "differences": [
                {"batch": n, "requests": len(compared[n]), "what": names[k]}
                | {"request": compared[n][row], "kinds": self._kinds(compared[n][row])}
                for n, k, row in wrong.nonzero().tolist()
            ],
            "requests": self.kinds,
            "seconds": round(time.monotonic() - start, 1),
        }

    def _batch(self, side: str, requests: list[Request], shape: Any) -> tuple[torch.Tensor, ...]:
        self.switch(side)
        reqs = [self._request(side, requests, r) for r in shape.requests]
        for req, first, last in zip(reqs, shape.starts, shape.stops, strict=True):
            req.prefix_len, req.extend_end = first, last
        batch = self.rig.batch(reqs)
        batch.prepare_for_extend()
        with self.streams.on_forward():
            if self.streams.cuda:  # the forward stream lags behind, as it does in a busy server
                torch.cuda._sleep(random.Random(shape.requests[0]).randrange(0, 400_000))
            self.rig.resolve(batch)
            self.record(self.kept, batch)
            torch.manual_seed(7)  # sampling is random
            return self.rig.run(batch)

    def _kinds(self, r: int) -> list[str]:
        """What the r-th request of the trace asks for besides its ids."""
        kinds = [kind for name, kind in KINDS.items() if name in sampling_of(r)]
        kinds += ["logprobs"] * (r % 7 == 3)
        return kinds + ["grammar"] * (r % 9 == 5 and self.grammars is not None)

    def _request(self, side: str, requests: list[Request], r: int) -> Any:
        if (side, r) not in self.live:
            ids = draw_ids(requests[r % len(requests)].length, VOCAB, r)
            req = self.rig.request(ids, max_new_tokens=1, **sampling_of(r))
            kinds = self._kinds(r)
            if "logprobs" in kinds:
                req.return_logprob, req.logprob_start_len = True, 0
            if "grammar" in kinds:
                req.grammar = self.grammars.new()
            if side == WITH:
                for name in kinds:
                    self.kinds[name] += 1
            self.live[side, r] = req
        return self.live[side, r]

    def launches(self) -> dict[str, list[str]]:
        """The kernels and copies that ForwardBatch.init_new launches for 8 requests, in order."""
        from torch.profiler import ProfilerActivity, profile

        told: dict[str, list[str]] = {}
        for side in SIDES:
            self.switch(side)
            for _ in range(2):  # in the second round all kernels are loaded
                reqs = [self.rig.request(draw_ids(60, VOCAB, r)) for r in range(8)]
                batch = self.rig.batch(reqs)
                batch.prepare_for_extend()
                with self.streams.on_forward():
                    self.rig.resolve(batch)
                    self.streams.settle()
                    kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
                    with profile(activities=kinds) as profiler:
                        self.rig.forward_batch(batch)
                        self.streams.settle()
                self.rig.release(*reqs)
            told[side] = [name[:60] for name in launched(profiler)]
        return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", type=int, default=10_000)
    parser.add_argument("--out", help="JSON; default bench/results/logits-<device>.json")
    args = parser.parse_args()
    console, cuda = Console(width=120), args.device.startswith("cuda")
    grammar = importlib.util.find_spec("xgrammar") is not None
    sglang_rig.stand_in(sglang_rig.CUDA_KERNELS if cuda else sglang_rig.KERNELS)
    requests = [Request(min(r.length, LONGEST)) for r in sample_trace()]
    with torch.no_grad():
        comparison = Comparison(args.device, Grammars() if grammar else None, console)
        console.print(comparison.status["line"], markup=False)
        result: dict[str, Any] = {
            "device_name": torch.cuda.get_device_name() if cuda else "host device",
            "stood_in": sglang_rig.STOOD_IN,
            "grammar": grammar,
            "plugin": comparison.status,
            "init_new": comparison.launches() if cuda else {},
            "logits": comparison.run(requests, args.batches),
        }
    console.print(result["logits"], result["init_new"])
    name = "logits-" + result["device_name"].lower().replace(" ", "-")
    console.print("written:", str(write_result(name, result, args.out)))
    return 1 if any(result["logits"]["different"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
