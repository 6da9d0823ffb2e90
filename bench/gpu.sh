#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU, in one call, with the packages already there.
#   bench/gpu.sh [build] [test] [stress] [sanitize] [suite] [demo]    default: all of them
#   bench/gpu.sh sustained                     MINUTES (20) of a trace, in calls of AT_MOST (8) minutes:
#                                              each goes on where the JSON in OUT, or in
#                                              bench/results, ends
#   SGLANG_WHEELS=DIR bench/gpu.sh sglang      the plugin in SGLang, installed from the wheels in DIR
#   bench/gpu.sh ranks                         one process per GPU: start-up, memory, NUMA nodes
#   bench/gpu.sh two [pipeline]                two GPUs: contexts and memory; the pipeline (GPUS=2), with
#                                              SGLang's predictor from the wheel or folder SGLANG_WHEEL,
#                                              and NCCL_BLOCKS=1 as the page's run 3
#   bench/gpu.sh logits                        in SGLang's own environment: logits with and without
#   PLAN=copies,direct bench/gpu.sh engine     the real SGLang engine, in SGLang's own environment; see
#                                              bench/engine. SECONDS_AT_MOST (500), DISCLOSE
# Results go to ${OUT:-bench/results}, with all that was printed in gpu.log. Give the commit as
# PYSTAGE_COMMIT where git is not. The suite takes peers that are not installed from the folder PEERS.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-bench/results}
python=${PYTHON:-python3}
parts=${*:-build test stress sanitize suite demo}
failed=0
logs=build/gpu; mkdir -p "$logs" "$out"
step() {  # step NAME COMMAND...: runs it, says how it went and how long it took
  local name=$1 start=$SECONDS; shift
  "$@" > "$logs/$name.log" 2>&1; local rc=$?
  { printf '\n===== %s: rc %d\n' "$name" $rc; cat "$logs/$name.log"; } >> "$out/gpu.log"
  echo "== $name: rc $rc, $((SECONDS - start)) s"
  [ $rc -eq 0 ] || { failed=1; tail -n "${TAIL:-40}" "$logs/$name.log"; }
}
for part in $parts; do
  case $part in
    build) step build "$python" -m pip install --no-build-isolation --no-deps --no-index -e . ;;
    test) PYSTAGE_TEST_SCALE=0.1 step test "$python" -m pytest -q -p no:cacheprovider
          tail -n 3 "$logs/test.log" ;;
    stress) step stress "$python" -m pytest -q -p no:cacheprovider tests/test_races.py -k stress
            tail -n 1 "$logs/stress.log" ;;
    sanitize)
      # Without backtraces: to make them it keeps Python's frames, and so every lease, alive.
      # All four take up to 4 x SANITIZE_S seconds: TOOLS='synccheck initcheck' runs some.
      for tool in ${TOOLS:-memcheck racecheck synccheck initcheck}; do
        PYSTAGE_TEST_HOLDS=0 PYSTAGE_TEST_SCALE=0.005 step "$tool" timeout ${SANITIZE_S:-170} \
          compute-sanitizer --tool $tool --error-exitcode 99 --show-backtrace no \
          "$python" -m pytest -q -p no:cacheprovider -m gpu \
          tests/test_races.py tests/test_gpu.py tests/test_pool.py tests/test_stage.py \
          tests/test_staged_tokens.py tests/test_batch.py \
          -k "not every_kind and not mixed_requests and not nvtx and not asserts_on_the_device"
        grep -E "(ERROR|RACECHECK|SYNCCHECK|INITCHECK) SUMMARY|passed|failed" "$logs/$tool.log" | tail -n 4
      done ;;
    suite) step suite "$python" -m bench --no-plots --out "$out/suite.json" ${PEERS:+--peers "$PEERS"}
           tail -c 9000 "$logs/suite.log" ;;
    sustained) if [ -e bench/results/sustained.json ] && [ ! -e "$out/sustained.json" ]; then
                 cp bench/results/sustained.json "$out"
               fi
               step sustained "$python" bench/sustained.py --minutes "${MINUTES:-20}" \
                 --at-most "${AT_MOST:-8}" --resume --out "$out/sustained.json"
               tail -n 20 "$logs/sustained.log" ;;
    sglang) step sglang "$python" -m bench.in_sglang.plugin --sglang-wheels "${SGLANG_WHEELS:?}" \
              --out "$out/sglang.json"; cat "$logs/sglang.log" ;;
    ranks) step ranks "$python" -m bench.ranks --out "$out/ranks.json"; cat "$logs/ranks.log" ;;
    two) step two "$python" -m bench.two_gpus --out "$out/two-gpus.json"; cat "$logs/two.log" ;;
    pipeline) step pipeline "$python" -m torch.distributed.run --nproc-per-node "${GPUS:-2}" \
                -m bench.pp.prefill --model 8b ${SGLANG_WHEEL:+--sglang-wheel "$SGLANG_WHEEL"} \
                ${NCCL_BLOCKS:+--nccl-blocks "$NCCL_BLOCKS"} \
                --out "$out/pp_prefill.json"; tail -n 30 "$logs/pipeline.log" ;;
    logits) step logits "$python" -m bench.in_sglang.logits --out "$out/logits.json"
            tail -n 12 "$logs/logits.log" ;;
    engine) step engine "$python" -m bench.engine --plan "${PLAN:-copies}" --seconds "${SECONDS_AT_MOST:-500}" \
              --out "$out/engine.json" ${DISCLOSE:+--disclose "$DISCLOSE"}; cat "$logs/engine.log" ;;
    demo) step demo "$python" -m pystage demo --json "$out/demo.json"; tail -n 45 "$logs/demo.log" ;;
  esac
done
exit $failed
