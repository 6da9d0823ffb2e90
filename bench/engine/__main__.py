"""Time to the first token of the real SGLang engine, with and without pystage.

python -m bench.engine                            on a GPU, in SGLang's environment: all GPU plans
python -m bench.engine --plan direct --scale 0.5  one plan, half the blocks
python -m bench.engine --plan tiny                on a CPU, a rehearsal
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from bench.common import RESULTS, amount, provenance, save
from bench.engine.experiment import Experiment
from bench.engine.plans import PLANS
from bench.engine.tables import HEAD, targets


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu = [name for name in PLANS if name != "tiny"]
    parser.add_argument("--plan", help=f"one or more of {', '.join(PLANS)} (all but tiny)")
    parser.add_argument("--seconds", type=float, default=1800, help="all of it may take (1800)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of blocks (1)")
    parser.add_argument("--layers", type=int, help="of the model, instead of its own number")
    parser.add_argument("--disclose", action="append", default=[], help="a line for the JSON")
    parser.add_argument("--out", type=Path, help="the JSON (bench/results/engine.json)")
    args = parser.parse_args(arguments)
    names = args.plan.split(",") if args.plan else gpu
    if unknown := [name for name in names if name not in PLANS]:
        parser.error(f"no plan {', '.join(unknown)}; there are {', '.join(PLANS)}")
    # A rehearsal is not what the pages are made from.
    out = args.out or (Path("build/engine.json") if names == ["tiny"] else RESULTS / "engine.json")
    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begun:6.1f} s] {text}", flush=True)

    result = {"benchmark": "engine", **provenance(), "disclosed": args.disclose, "plans": {}}
    rows, traces = [], {}
    for name in names:
        plan = PLANS[name]
        if args.layers:
            plan.model["num_hidden_layers"] = args.layers
        left = args.seconds - (time.monotonic() - begun)
        say(f"{name}: {plan.about}\n           {HEAD}")
        experiment = Experiment(plan, out.parent / "engine-logs", left, args.scale, say)
        try:
            experiment.run()
        finally:
            found = {"model": plan.model, "engine": plan.engine, **experiment.result}
            result["plans"][name] = found
            rows += found["rows"]
            traces |= {f"{name}: {w}": t for w, t in found["traces"].items()}
            result["targets"] = targets(rows, traces)
            save(out, result)
        for cut in found["cut"]:
            say(f"{name} is not whole: {cut}")
    for target in result["targets"]:
        met = {True: "met", False: "MISSED", None: "not measured"}[target["ok"]]
        if target["ok"] is False and target.get("within_noise"):
            met = "above, within the noise"
        where = f", {target['where']}, 95 % {target['interval']}" if "where" in target else ""
        print(f"{target['measure']}: {amount(target)} ({target['target']}{where}): {met}")
    print(f"written: {out}")
    wrong = any(row["different_outputs"] for row in rows)
    whole = rows and not any(found["cut"] for found in result["plans"].values())
    return 0 if whole and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
