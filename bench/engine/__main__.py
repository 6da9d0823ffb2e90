"""Time to the first token of the real SGLang engine, with and without pystage.

python -m bench.engine                            in SGLang's environment: the plans of one GPU
python -m bench.engine --plan direct --scale 0.5  one plan, half the blocks
python -m bench.engine --plan tiny                a trial run on a CPU
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from bench.common import BUILD, RESULTS, amount, provenance, save
from bench.engine.experiment import Experiment
from bench.engine.plans import PLANS
from bench.engine.tables import HEAD, targets, verdict


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    one_gpu = [n for n, p in PLANS.items() if n != "tiny" and p.gpus == 1]
    parser.add_argument("--plan", help=f"one or more of {', '.join(PLANS)} (all of one GPU)")
    parser.add_argument("--seconds", type=float, default=1800, help="all of it may take (1800)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of blocks (1)")
    parser.add_argument("--layers", type=int, help="of the model, instead of its own number")
    parser.add_argument("--disclose", action="append", default=[], help="a line for the JSON")
    parser.add_argument(
        "--out",
        type=Path,
        help="the JSON; default: bench/results for whole plans on a GPU, build/bench for less",
    )
    args = parser.parse_args(arguments)
    names = args.plan.split(",") if args.plan else one_gpu
    if unknown := [name for name in names if name not in PLANS]:
        parser.error(f"no plan {', '.join(unknown)}; there are {', '.join(PLANS)}")
    # The pages use only whole plans on a GPU.
    whole = "tiny" not in names and args.scale >= 1 and not args.layers
    whole = whole and torch.cuda.is_available()
    out = args.out or (RESULTS if whole else BUILD) / "engine.json"
    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begun:6.1f} s] {text}", flush=True)

    result = {"benchmark": "engine", **provenance(), "disclosed": args.disclose, "plans": {}}
    rows, traces = [], {}
    for name in names:
        plan = PLANS[name]
        if args.layers:
            plan = replace(plan, model={**plan.model, "num_hidden_layers": args.layers})
        left = args.seconds - (time.monotonic() - begun)
        say(f"{name}: {plan.about}\n           {HEAD}")
        experiment = Experiment(plan, out.parent / "engine-logs", left, args.scale, say)
        try:
            experiment.run()
        finally:
            found = {"model": plan.model, "engine": plan.engine, **experiment.result}
            result["plans"][name] = found
            if plan.same_chunks:  # other chunks are meant to change the times
                rows += [{**row, "plan": name} for row in found["rows"]]
                traces |= {f"{name}: {w}": t for w, t in found["traces"].items()}
            result["targets"] = targets(rows, traces)
            save(out, result)
        for cut in found["cut"]:
            say(f"{name} is not whole: {cut}")
    for target in result["targets"]:
        where = f", {target['where']}, 95 % {target['interval']}" if "where" in target else ""
        limit = f"{target['target']}{where}"
        print(f"{target['measure']}: {amount(target)} ({limit}): met: {verdict(target)}")
    print(f"written: {out}")
    wrong = any(row["different_outputs"] for row in rows)
    plans = result["plans"].values()
    return 1 if wrong or any(found["cut"] or not found["rows"] for found in plans) else 0


if __name__ == "__main__":
    sys.exit(main())
