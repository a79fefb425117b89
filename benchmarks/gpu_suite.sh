#!/usr/bin/env bash
# Everything a machine with an NVIDIA card can tell, in under 8 minutes and without a network:
#
#     benchmarks/gpu_suite.sh [RESULTS_FOLDER]
#
# Builds, runs the test suite on the device, compute-sanitizer on a small case of each kernel, and the layer, step,
# throughput and memory benchmarks. Logs, rows and figures go to RESULTS_FOLDER, by default benchmarks/results/<card>.
# Each part has its own time limit, and a failing part does not stop the next; the exit status is the number of failures.
#
#     PYTHON   the interpreter, with torch, torchvision, pytest, matplotlib and tqdm; default python3
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
card=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name(0).lower().replace(" ", "-"))' 2>/dev/null) || {
    echo "no CUDA device that torch can use" >&2
    exit 1
}
results=${1:-benchmarks/results/$card}
mkdir -p "$results"
summary=$results/summary.txt
: >"$summary"
rm -f "$results"/*.csv
failures=0
BUDGET=470 # seconds for everything

# part NAME SECONDS COMMAND...: its output to NAME.log, its status and duration to summary.txt
part() {
    local name=$1 limit=$2 start=$SECONDS left=$((BUDGET - SECONDS)) status
    shift 2
    if [ "$left" -lt 10 ]; then
        echo "$name: no time left" | tee -a "$summary"
        failures=$((failures + 1))
        return
    fi
    echo "== $name"
    [ "$limit" -le "$left" ] || limit=$left
    timeout --kill-after=5 "$limit" "$@" >"$results/$name.log" 2>&1
    status=$?
    tail -n 3 "$results/$name.log"
    echo "$name: exit $status after $((SECONDS - start)) s" | tee -a "$summary"
    [ "$status" -eq 0 ] || failures=$((failures + 1))
}

bench() {
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$PYTHON" -m benchmarks "$@" --csv "$results/${name%%_*}.csv"
}

part environment 30 bash -c "nvidia-smi; '$PYTHON' -c 'import sys, torch; print(sys.version, torch.__version__, torch.version.cuda)'"
GRADAUG_BUILD_CUDA=1 part build 120 "$PYTHON" -m pip install --no-index --no-build-isolation --no-deps .
part tests 100 "$PYTHON" -m pytest tests -q -rs
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        for owner in triton cpp; do
            GRADAUG_CUDA=$owner part "${tool}_$owner" 30 \
                compute-sanitizer --tool $tool --error-exitcode 1 "$PYTHON" -m benchmarks.kernels
        done
    done
else
    echo "compute-sanitizer: not found" | tee -a "$summary"
fi
bench layers 60 layers --model resnet50 --batch 64 --dtype bf16 --widths 0.93 --providers ours,eager,eager8 --repeats 15
bench step_resnet50_bf16 60 step --model resnet50 --batch 64 --dtype bf16 --providers ours,eager,eager8 --new-width
bench step_resnet50_fp32 40 step --model resnet50 --batch 64 --dtype fp32 --providers ours,eager,eager8
bench step_wrn_bf16 40 step --model wrn-28-10 --batch 128 --dtype bf16 --providers ours,eager,eager8
bench memory 40 memory --model resnet50 --batch 64 --dtype bf16
bench throughput 40 throughput --model resnet50 --batch 64 --dtype bf16
part plot 20 "$PYTHON" -m benchmarks.plot "$results"
echo "$failures of the parts failed, $SECONDS s; see $results"
exit "$failures"
