#!/usr/bin/env bash
# Everything that waits for a GPU, in one command of less than ten minutes: building the CUDA extension for it, the
# kernels' tests, the benchmarks, how busy the tensor cores are (where ncu is found), and compute-sanitizer on the tests'
# small cases. Leaves JSON, plots and logs in the folder given (default: benchmarks/results). Goes on past a failure, and
# says at the end what failed or found no time.
#
#     benchmarks/gpu_check.sh [FOLDER]        BUDGET=seconds for another limit, PYTHON=... for another interpreter
set -u
cd "$(dirname "$0")/.." || exit 1
out=${1:-benchmarks/results}
mkdir -p "$out" || exit 1
python=${PYTHON:-python3}
export PYTHONPATH=${PYTHONPATH-}
unset TRITON_INTERPRET
deadline=$((SECONDS + ${BUDGET:-570}))
failed=()

run() { # NAME LIMIT COMMAND...: its output goes to NAME.log and its last lines to the terminal
    local name=$1 limit=$2 left=$((deadline - SECONDS)) start=$SECONDS
    shift 2
    if ((left < 15)); then
        failed+=("$name (no time left)")
        return
    fi
    echo "== $name: $*"
    if ! timeout "$((limit < left ? limit : left))" "$@" >"$out/$name.log" 2>&1; then
        failed+=("$name")
    fi
    tail -n "${LINES_SHOWN:-14}" "$out/$name.log"
    echo "== $name took $((SECONDS - start)) s"
}

bench() { # NAME LIMIT BACKENDS ARGUMENTS...: a benchmark with its JSON and plots
    local name=$1 limit=$2 backends=$3
    shift 3
    run "$name" "$limit" "$python" -m fastden bench "$@" --device cuda --dtype bfloat16 --backends "$backends" \
        --json "$out/$name.json" --plots "$out/$name"
}

# fastden.kernels is there only where fastden is installed.
$python -c 'import fastden.kernels' 2>/dev/null ||
    $python -m pip install --quiet --no-deps --no-build-isolation -e . || exit 1
$python -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"' || exit 1
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv | tee "$out/gpu.txt"
workers=()
$python -c 'import xdist' 2>/dev/null && workers=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
# The search for the fastest form takes minutes, and a command that runs out of time writes nothing: it comes last.
peers=(--compare eager,channels_last,compile)
run build 150 "$python" -m fastden build
training=torch,triton # the CUDA kernels make no batch statistics
inference=$training
$python -c 'from fastden.cuda import extension; raise SystemExit(len(extension.why_not()))' && inference=$training,cuda
run gpu-tests 170 \
    "$python" -m pytest tests/kernels tests/ops tests/cuda -q --maxfail=40 -p no:cacheprovider "${workers[@]}"
bench ops 60 "$inference" ops --size 1080 1920 "${peers[@]}"
run conv3-tiles 40 "$python" benchmarks/conv3_tiles.py --json "$out/conv3-tiles.json"
bench model-2160 60 "$inference" model --size 2160 3840 --batch 1 "${peers[@]}"
bench model-1080 60 "$inference" model --size 1080 1920 --batch 8 "${peers[@]}"
bench train 60 "$training" train --size 128 128 --batch 64 "${peers[@]}"
bench ops-backward 60 "$training" ops --backward --size 1080 1920 --compare eager,channels_last
if command -v ncu >/dev/null; then
    # How busy each of the CUDA kernels keeps the tensor cores, in a single pass of the network, at the clocks that it finds.
    network='import torch, fastden
from fastden import ops
model = fastden.fuse(fastden.Denoiser.from_pretrained("color").cuda(), torch.bfloat16)
with torch.no_grad(), ops.use_backend("cuda"):
    model(torch.rand(1, 3, 2160, 3840, device="cuda"), 0.1)
torch.cuda.synchronize()'
    metrics=sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active,gpu__time_duration.sum
    kernels='regex:^(concat|convolution|bottleneck|stem|head)_kernel'
    run tensor-cores 60 ncu --csv --clock-control none --metrics "$metrics" --kernel-name "$kernels" "$python" -c "$network"
fi
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck synccheck; do
        # Without PyTorch's cache every tensor is an allocation of its own, whose bounds memcheck knows. Libraries ask
        # the driver for what it may not have: such an answer is no error.
        run "sanitizer-$tool" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 9 \
            "$python" -m pytest tests/kernels tests/cuda -q -x -k "layout or nan" -p no:cacheprovider
    done
else
    failed+=("sanitizer (compute-sanitizer is not on the PATH)")
fi
bench model-max-autotune 200 "$inference" model --size 2160 3840 --batch 1 --compare max_autotune
if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "all passed; results in $out"
