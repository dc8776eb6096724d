#!/usr/bin/env bash
# Everything that waits for a GPU, in one command: the kernels' tests, compute-sanitizer on their small cases, and the
# benchmarks. Leaves JSON and logs in the folder given (default: benchmarks/results). Goes on past a failure, and says
# at the end what failed.
#
#     benchmarks/gpu_check.sh [FOLDER]
set -u
cd "$(dirname "$0")/.." || exit 1
out=${1:-benchmarks/results}
mkdir -p "$out"
python=${PYTHON:-python3}
export PYTHONPATH=${PYTHONPATH-}
unset TRITON_INTERPRET
failed=()

run() { # NAME COMMAND...: its output goes to NAME.log and its last lines to the terminal
    local name=$1
    shift
    echo "== $name: $*"
    if ! timeout "${LIMIT:-240}" "$@" >"$out/$name.log" 2>&1; then
        failed+=("$name")
    fi
    tail -n 12 "$out/$name.log"
}

# fastden.kernels is there only where fastden is installed.
$python -c 'import fastden.kernels' 2>/dev/null ||
    $python -m pip install --quiet --no-deps --no-build-isolation -e . || exit 1
$python -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"' || exit 1
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv | tee "$out/gpu.txt"
run gpu-tests "$python" -m pytest tests/kernels tests/ops -q --maxfail=20 -p no:cacheprovider
run compile "$python" benchmarks/compile_kernels.py --json "$out/compile.json"
for size in "2160 3840" "1080 1920"; do
    # shellcheck disable=SC2086
    run "model-${size%% *}" "$python" benchmarks/bench_model.py --size $size --json "$out/model-${size%% *}.json"
done
run train "$python" benchmarks/bench_model.py --train --batch 64 --size 128 128 --json "$out/train.json"
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck synccheck; do
        run "sanitizer-$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$python" -m pytest tests/kernels -q -x -k "any_layout or nan" -p no:cacheprovider
    done
fi
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}"
    exit 1
fi
echo "all passed; results in $out"
