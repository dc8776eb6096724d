#!/usr/bin/env bash
# Everything that waits for a GPU, in three parts of less than ten minutes each. Goes on past a failure, and says at the
# end what failed or found no time; status.json in the folder says it to benchmarks/prove.py, which turns a folder of
# results into the table of the automatic choice.
#
#   check     building the CUDA extension; conv3 in the order in which mistakes show soonest; the kernels' tests;
#             compute-sanitizer on the tests' small cases and on those where a block does several tiles
#   operators each operator against its rivals at four sizes, forward, and its gradients
#   network   the network and its training against their rivals, tiles of conv3, how busy the tensor cores are (ncu)
#
#     benchmarks/gpu_check.sh [FOLDER] [PART...]
#
# Tiles are searched by a command of its own: FASTDEN_TUNED=FOLDER/tuned.json python benchmarks/tune.py. Where that file
# lies in the folder, the parts run on what it says. Users do not have it: prove.py then proves nothing before it has
# become the kernels' defaults.
#
# FOLDER is benchmarks/results by default, and all parts are run. BUDGET=seconds limits each part (default 570),
# PYTHON=... is another interpreter.
set -u
cd "$(dirname "$0")/.." || exit 1
out=${1:-benchmarks/results}
shift || true
parts=("$@")
((${#parts[@]})) || parts=(check operators network)
mkdir -p "$out" || exit 1
python=${PYTHON:-python3}
export PYTHONPATH=${PYTHONPATH-}
unset TRITON_INTERPRET
deadline=0
failed=()

record() { # NAME STATUS: to status.json
    python3 - "$out/status.json" "$1" "$2" <<'PYTHON'
import json, pathlib, sys
file, name, status = pathlib.Path(sys.argv[1]), *sys.argv[2:]
found = json.loads(file.read_text()) if file.exists() else {}
file.write_text(json.dumps(found | {name: status}, indent=1) + "\n")
PYTHON
}

run() { # NAME LIMIT COMMAND...: its output goes to NAME.log and its last lines to the terminal
    local name=$1 limit=$2 left=$((deadline - SECONDS)) start=$SECONDS
    shift 2
    if ((left < 15)); then
        failed+=("$name (no time left)")
        record "$name" "no time left"
        return
    fi
    echo "== $name: $*"
    if timeout "$((limit < left ? limit : left))" "$@" >"$out/$name.log" 2>&1; then
        record "$name" passed
    else
        failed+=("$name")
        record "$name" failed
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

export FASTDEN_TUNED=$out/tuned.json
if [[ -e $FASTDEN_TUNED ]]; then record tiles searched; else record tiles default; fi

# fastden.kernels is there only where fastden is installed.
$python -c 'import fastden.kernels' 2>/dev/null ||
    $python -m pip install --quiet --no-deps --no-build-isolation -e . || exit 1
$python -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"' || exit 1
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv | tee "$out/gpu.txt"
workers=()
$python -c 'import xdist' 2>/dev/null && workers=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
# The search for the fastest form takes minutes, and a command that runs out of time writes nothing: it comes last.
peers=(--compare eager,channels_last,compile)
rivals=(--compare eager,channels_last,compile,fused_compile)

part_check() {
    run build 150 "$python" -m fastden build
    backends_here
    # Each apart: what hangs is stopped, and leaves the GPU to the next.
    local check
    for check in one-pixel one-hot tiles large repeats thread graph; do
        run "first-$check" 60 "$python" benchmarks/first_checks.py "$check" --backend "${kernels[@]}"
    done
    run gpu-tests 170 \
        "$python" -m pytest tests/kernels tests/ops tests/cuda -q --maxfail=40 -p no:cacheprovider "${workers[@]}"
    if ! command -v compute-sanitizer >/dev/null; then
        failed+=("sanitizer (compute-sanitizer is not on the PATH)")
        return
    fi
    local tool
    for tool in memcheck racecheck synccheck; do
        # Without PyTorch's cache every tensor is an allocation of its own, whose bounds memcheck knows. Libraries ask
        # the driver for what it may not have: such an answer is no error.
        run "sanitizer-$tool" 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 9 \
            "$python" -m pytest tests/kernels tests/cuda -q -x -k "layout or nan or several_tiles or more_tiles" -p no:cacheprovider
    done
}

part_operators() {
    backends_here
    bench ops-256 60 "$inference" ops --size 256 256 "${peers[@]}"
    bench ops-512 60 "$inference" ops --size 512 768 "${peers[@]}"
    bench ops-1080 90 "$inference" ops --size 1080 1920 "${peers[@]}"
    bench ops-2160 150 "$inference" ops --size 2160 3840 "${peers[@]}"
    bench ops-backward 60 "$training" ops --backward --size 1080 1920 --compare eager,channels_last
    # The same with PyTorch's own gradients of convolutions.
    FASTDEN_BACKWARD=aten bench ops-backward-aten 60 "$training" \
        ops --backward --size 1080 1920 --compare eager,channels_last
}

part_network() {
    backends_here
    run conv3-tiles 40 "$python" benchmarks/conv3_tiles.py --json "$out/conv3-tiles.json"
    bench model-2160 90 "$inference" model --size 2160 3840 --batch 1 "${rivals[@]}"
    bench model-1080 90 "$inference" model --size 1080 1920 --batch 8 "${rivals[@]}"
    bench train 60 "$training" train --size 128 128 --batch 64 "${peers[@]}"
    FASTDEN_BACKWARD=aten bench train-aten 60 "$training" train --size 128 128 --batch 64 "${peers[@]}"
    if command -v ncu >/dev/null; then
        # How busy each of the CUDA kernels keeps the tensor cores, in a single pass of the network, at the clocks that it
        # finds.
        local network='import torch, fastden
from fastden import ops
model = fastden.fuse(fastden.Denoiser.from_pretrained("color").cuda(), torch.bfloat16)
with torch.no_grad(), ops.use_backend("cuda"):
    model(torch.rand(1, 3, 2160, 3840, device="cuda"), 0.1)
torch.cuda.synchronize()'
        local metrics=sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active,gpu__time_duration.sum
        local names='regex:^(concat|convolution|bottleneck|stem|head)_kernel'
        run tensor-cores 60 \
            ncu --csv --clock-control none --metrics "$metrics" --kernel-name "$names" "$python" -c "$network"
    fi
    bench model-max-autotune 200 "$inference" model --size 2160 3840 --batch 1 --compare max_autotune
}

backends_here() { # those that can run, once what can be built is
    training=torch,triton # the CUDA kernels make no batch statistics
    inference=$training
    kernels=(triton)
    if $python -c 'from fastden.cuda import extension; raise SystemExit(len(extension.why_not()))'; then
        inference=$training,cuda
        kernels=(triton cuda)
    fi
}

for part in "${parts[@]}"; do
    deadline=$((SECONDS + ${BUDGET:-570}))
    "part_$part"
done
if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "all passed; results in $out"
