#!/usr/bin/env bash
# Everything that waits for a GPU. Goes on past a failure, and says at the end what failed or found no time; status.json
# in the folder says it to benchmarks/prove.py, which turns a folder of results into the table of the automatic choice. Its
# steps are of one commit and one GPU: a call at another commit begins it anew, one at the same commit adds to it.
#
#     benchmarks/gpu_check.sh [FOLDER [PART...]]
#
#   first      builds the CUDA extension, and meanwhile checks conv3 on Triton in the order in which mistakes show
#              soonest; then the same on CUDA                                                          2 to 3 minutes
#   quick      the network at 2160 x 3840, 256 x 256 and 8 x 1080 x 1920, against its rivals             2 minutes
#   tests      the kernels' tests, and compute-sanitizer on small cases and on those where a block does several tiles,
#              of Triton and of CUDA, all at the same time: nothing is timed                           3 to 4 minutes
#   operators  each operator against its rivals at four sizes                                          3 to 4 minutes
#   network    a training step against its rivals; tiles of conv3; gradients, by operator, all on Triton's kernels and all on
#              PyTorch's; how busy the tensor cores are (ncu); a compiled training step; max-autotune 8 to 15 minutes
#   proof      what prove.py asks for, in the shortest time: "first" and "tests" at the same time, meanwhile
#              torch.compile fills its cache; then calls of the network, "operators", the network   7 to 9 minutes
#   tune       searches tiles into FOLDER/tuned.json, which the parts run on from then on. Users do not have that file:
#              prove.py then proves nothing before it has become the kernels' defaults                   9 minutes
#   color      trains benchmarks/training/color-gpu.yaml, or goes on with it, as far as the time allows  9 minutes
#   photo      trains benchmarks/training/photo-gpu-2.yaml; its steps are as many as fit                 9 minutes
#
# On an H200 first took 70 seconds, quick two minutes. On an H100 with 16 cores the checks of proof took 190 seconds; its
# times did not fit into the 230 that it had. The others are guesses. Without a PART: first quick tests operators network.
# BUDGET=seconds limits the call (default 570). With a quarter of an hour of a GPU, a minute or two of which its start takes,
# proof gets all of a call, for nothing is proven where one of its steps is missing. What is left goes to a second call:
#
#     BUDGET=570 bash benchmarks/gpu_check.sh FOLDER proof
#     BUDGET=200 bash benchmarks/gpu_check.sh FOLDER network
#
# Steps run in the order of what they are worth, and what finds no time is the last ones. Each writes its log, and its JSON
# after each result, so a call that is killed leaves what it has. ARCHIVE=FILE.tar.gz keeps a copy of the folder after each
# step, for machines that hand back few files. PYTHON=... is another interpreter. DATA=... is the folder with the
# photographs of the training (default data/train, as in the configurations).
# Packages that are missing are named first; pip download fetches their wheels for a machine that reaches no registry.
# Pictures of results:
# python -c 'import json, sys; from pathlib import Path; from fastden.bench import plots;
#     plots.draw(json.load(open(sys.argv[1])), Path(sys.argv[2]))' FOLDER/ops-2160.json FOLDER
set -u
cd "$(dirname "$0")/.." || exit 1
out=${1:-benchmarks/results}
shift || true
parts=("$@")
((${#parts[@]})) || parts=(first quick tests operators network)
known=(first quick tests operators network proof tune color photo)
is_part() {
    local name
    for name in "${known[@]}"; do
        if [[ $1 == "$name" ]]; then return 0; fi
    done
    return 1
}
for part in "${parts[@]}"; do
    if ! is_part "$part"; then
        printf -v accepted ', %s' "${known[@]}"
        echo "part: $part; accepted: ${accepted#, }" >&2
        exit 2
    fi
done
if is_part "$out"; then # it would run other parts, into a folder of that name
    echo "folder: $out is the name of a part; accepted: a folder before the parts (./$out for one of that name)" >&2
    exit 2
fi
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
# Scripts find their own folder first, not this checkout: another one may be installed.
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# The extension is built for the GPU that is here, and what runs is what users have by default.
unset TRITON_INTERPRET TORCH_CUDA_ARCH_LIST FASTDEN_BACKEND FASTDEN_BACKWARD
deadline=$((SECONDS + ${BUDGET:-570}))
steps=()
pytest=("$python" -m pytest -q -p no:cacheprovider -m "not slow")
# Before each of them, and before what runs it: with CI, hypothesis draws the same examples in every run (tests/conftest.py).
# One that fails by chance leaves the whole backend without an entry: of 261 tests on an H100, the one that failed passed when
# its numbers were drawn anew.
repeatable=(env CI=1)
# The files outside of tests/kernels and tests/cuda that hold tests which wait for a GPU. The others are not named: without
# pyvips four of them cannot be collected.
gpu_tests=(tests/ops/test_backends.py tests/ops/test_triton_start.py tests/inference/test_tile_memory.py tests/api/test_images.py
    tests/bench/test_timing.py)
# Those that run only where these packages are: pytest ends with an error if it cannot import the first's conftest.py.
gpu_tests_of_packages=(
    "tests/training/test_averages.py lightning pydantic"
    "tests/training/test_denoise.py lightning pydantic"
    "tests/batch/test_denoiser.py pyvips tifftools"
    "tests/inference/test_arrays.py dask zarr"
)
sanitized_triton=(tests/kernels/test_{convolutions,bottleneck,head,stem,network_input}.py)

record() { # NAME STATUS: to status.json; steps that run at the same time wait for each other
    # What found no time stays as an earlier call at this commit and on this GPU left it.
    python3 - "$out/status.json" "$1" "$2" <<'PYTHON'
import fcntl, json, pathlib, sys
file, name, status = pathlib.Path(sys.argv[1]), *sys.argv[2:]
with file.with_suffix(".lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    found = json.loads(file.read_text()) if file.exists() else {}
    if status == "no time left":
        status = found.get(name, status)
    part = file.with_suffix(".part")  # what is killed while it writes leaves the file as it was
    part.write_text(json.dumps(found | {name: status}, indent=1) + "\n")
    part.replace(file)
PYTHON
}

record_tiles() { # those that the next part runs on; results on searched ones stay in the folder, and so does the note
    if [[ -e $FASTDEN_TUNED ]]; then
        record tiles searched
    elif ! grep -q '"tiles": "searched"' "$out/status.json"; then
        record tiles default
    fi
}

limited() { # NAME LIMIT COMMAND...: its output goes to NAME.log; it ends with the call
    local log=$out/$1.log limit=$2 left=$((deadline - SECONDS))
    shift 2
    ((left > 0)) || return 124
    # What hangs in the driver does not end at the first signal.
    nice -n "${nicety:-0}" timeout -k 5 "$((limit < left ? limit : left))" "$@" >"$log" 2>&1
}

step() { # NAME LIMIT COMMAND...: its output goes to NAME.log and its last lines to the terminal
    local name=$1 limit=$2 left=$((deadline - SECONDS)) start=$SECONDS status
    shift 2
    if ((left < 15)); then
        echo "== $name: no time left"
        record "$name" "no time left"
        return
    fi
    echo "== $name: $*"
    limited "$name" "$limit" "$@"
    case $? in 0) status=passed ;; 124 | 137) status="timed out" ;; *) status=failed ;; esac
    record "$name" "$status"
    {
        tail -n "${LINES_SHOWN:-14}" "$out/$name.log"
        echo "== $name $status after $((SECONDS - start)) s"
    } | cat
}

run() { # as step, and waits for it
    steps+=("$1")
    step "$@"
    keep
}

start() { # as step, at the same time as what follows, up to the next wait
    steps+=("$1")
    step "$@" &
}

bench() { # NAME LIMIT BACKENDS ARGUMENTS...: a benchmark with its JSON
    local name=$1 limit=$2 backends=$3
    shift 3
    run "$name" "$limit" "$python" -m fastden bench "$@" --device cuda --dtype bfloat16 --backends "$backends" \
        --json "$out/$name.json"
}

keep() { # the folder, in ARCHIVE, which is whole at any time
    [[ -n ${ARCHIVE-} ]] || return 0
    local part=$ARCHIVE.$BASHPID # of this process: steps that run at the same time keep the folder, too
    tar -czf "$part" -C "$(dirname "$out")" "$(basename "$out")"
    # 1: files changed while tar read them, as those of steps that run do.
    if (($? > 1)); then rm -f "$part"; else mv "$part" "$ARCHIVE"; fi
}

backends_here() { # those that can run, once what can be built is
    training=torch,triton # the CUDA kernels make no batch statistics
    inference=$training
    kernels=(triton)
    if timeout -k 5 60 "$python" -c 'from fastden.cuda import extension; raise SystemExit(len(extension.why_not()))' 2>/dev/null; then
        inference=$training,cuda
        kernels=(triton cuda)
    elif [[ " ${steps[*]-} " != *" build "* ]]; then
        echo "note: the CUDA extension is not built: first or proof builds it; prove.py wants one of them" >&2
    fi
}

first_checks() { # BACKEND. Each apart: what hangs is stopped, and leaves the GPU to the next.
    local check
    for check in $(checks_of "$1"); do
        run "first-$1-$check" 120 "$python" benchmarks/first_checks.py "$check" --backend "$1"
    done
}

start_first_checks() { # BACKEND: at the same time as what follows
    local check
    first_checks "$1" &
    # The names that the process beside this one adds stay there.
    for check in $(checks_of "$1"); do steps+=("first-$1-$check"); done
}

checks_of() { # BACKEND
    echo one-pixel one-hot tiles large repeats thread graph
    if [[ $1 == cuda ]]; then echo fp8; fi
}

part_first() {
    start build 240 "$python" -m fastden build
    first_checks triton
    wait
    backends_here
    if [[ ${kernels[*]} == *cuda* ]]; then first_checks cuda; fi
}

part_quick() {
    backends_here
    bench model-2160 120 "$inference" model --size 2160 3840 --batch 1 "${rivals[@]}"
    calls_of_small_images
    bench model-1080 100 "$inference" model --size 1080 1920 --batch 8 "${rivals[@]}"
}

part_tests() {
    backends_here
    # What Triton compiles is most of the work.
    tests_of_triton
    if [[ ${kernels[*]} == *cuda* ]]; then tests_of_cuda; fi
    tests_of_all_else
    sanitize triton "${sanitized_triton[@]}"
    if [[ ${kernels[*]} == *cuda* ]]; then
        sanitize cuda tests/cuda/test_operators.py
        sanitize fp8 tests/cuda/test_fp8.py
    fi
    wait
    keep
    stack_of_crash tests-cuda tests/cuda/test_operators.py tests/cuda/test_network.py
}

tests_of_triton() {
    start tests-triton 300 "${repeatable[@]}" "${pytest[@]}" --maxfail=40 "${workers[@]}" tests/kernels
}

tests_of_cuda() {
    # Workers, because a test that ends its process would end all.
    start tests-cuda 300 "${repeatable[@]}" "${pytest[@]}" --maxfail=40 "${workers[@]:+-n4}" tests/cuda/test_operators.py \
        tests/cuda/test_network.py
    # Apart: it is not chosen by itself, so that its faults do not hold back the other kernels.
    start tests-fp8 200 "${repeatable[@]}" "${pytest[@]}" --maxfail=40 tests/cuda/test_fp8.py
}

tests_of_all_else() {
    local files=("${gpu_tests[@]}") one file packages
    for one in "${gpu_tests_of_packages[@]}"; do
        read -r file packages <<<"$one"
        # shellcheck disable=SC2086 # several packages
        if "$python" -c 'import sys
from importlib.util import find_spec
sys.exit(not all(map(find_spec, sys.argv[1:])))' $packages; then
            files+=("$file")
        else
            echo "note: $file is passed over: it needs $packages" >&2
        fi
    done
    # The last -m counts.
    start tests-gpu 200 "${repeatable[@]}" "${pytest[@]}" -m "gpu and not slow" "${files[@]}"
}

stack_of_crash() { # STEP FILE...: if pytest died in that step, runs the test that it died in again, for its C++ stack
    local test
    test=$(grep -A100 "^Fatal Python error" "$out/$1.log" 2>/dev/null | grep -om1 "in test_[a-z0-9_]*") || return 0
    command -v cuda-gdb >/dev/null || return 0
    run "$1-stack" 90 "${repeatable[@]}" \
        cuda-gdb -batch -return-child-result -ex run -ex "bt 40" -ex "x/i \$pc" -ex "info sharedlibrary" \
        --args "$python" -m pytest -q -x -p no:cacheprovider -k "${test#in }" "${@:2}"
}

sanitize() { # BACKEND FILE...: each of the sanitizer's tools, at the same time
    local tool
    if ! command -v compute-sanitizer >/dev/null; then
        steps+=(sanitizer)
        record sanitizer "compute-sanitizer is not on the PATH"
        return
    fi
    for tool in racecheck memcheck synccheck; do
        # Without PyTorch's cache every tensor is an allocation of its own, whose bounds memcheck knows. Libraries ask the
        # driver for what it may not have: such an answer is no error.
        start "sanitizer-$1-$tool" 300 "${repeatable[@]}" PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 9 \
            "${pytest[@]}" "${@:2}" -x -k "layout or nan or several_tiles or more_tiles"
    done
}

fill_caches() { # what PyTorch compiles for one process is there for the next
    local size sizes
    # Beside checks and tests, whose memory it is, too: cuDNN, which tries its algorithms on references of float64, may take
    # 4096 MiB for one. Nothing is measured here.
    local -x CUDNN_CONV_WSCAP_DBG=4096
    # A process for two sizes: memory would not do for four.
    for sizes in "256 256:1080 1920" "512 768:2160 3840"; do
        (
            for size in "${sizes%:*}" "${sizes#*:}"; do
                # shellcheck disable=SC2086 # height and width
                limited "compiling-${size% *}" 120 "$python" -m fastden bench ops --size $size --device cuda \
                    --dtype bfloat16 --backends torch --compare compile --rounds 1 --energy 0
            done
        ) &
    done
    limited compiling-model 120 "$python" -m fastden bench model --size 2160 3840 --batch 1 --device cuda \
        --dtype bfloat16 --backends torch --compare compile,fused_compile --rounds 1 &
}

part_proof() {
    # Without the build in time there are no CUDA steps at all: it comes first, and all else gets what it leaves of the
    # processor's cores, which a dozen workers share.
    start build 240 "$python" -m fastden build
    local build=$! nicety=10
    # One after the other they take the longest (seen on an H100): they do not wait for the build.
    start_first_checks triton
    tests_of_triton
    sanitize triton "${sanitized_triton[@]}"
    fill_caches
    wait "$build"
    keep
    tests_of_all_else # behind the build, which some of them choose
    backends_here
    if [[ ${kernels[*]} == *cuda* ]]; then
        sanitize cuda tests/cuda/test_operators.py
        tests_of_cuda
        start_first_checks cuda
    fi
    wait
    nicety=0
    keep
    # First what prove.py asks for, and of that first what would void all entries alone. The network's times are written
    # once all its contenders are timed.
    calls_of_small_images
    part_operators
    if [[ ${kernels[*]} == *cuda* ]]; then run fp8-time 40 "$python" benchmarks/first_checks.py fp8 --backend cuda; fi
    bench model-2160 90 "$inference" model --size 2160 3840 --batch 1 "${rivals[@]}"
    stack_of_crash tests-cuda tests/cuda/test_operators.py tests/cuda/test_network.py
}

calls_of_small_images() { # without CUDA graphs: what the host needs for a launch decides here
    # Calls of a millisecond, which other programs disturb: 40 rounds once left Triton's quartile above PyTorch's.
    bench model-256 60 "$inference" model --size 256 256 --batch 1 --rounds 200 \
        --compare fastden-auto,channels_last,eager
}

part_operators() {
    backends_here
    # A contender's energy takes a second and more; at four sizes that would be half of the time.
    bench ops-2160 150 "$inference" ops --size 2160 3840 "${peers[@]}" --energy 0
    bench ops-1080 120 "$inference" ops --size 1080 1920 "${peers[@]}" --energy 0
    bench ops-512 90 "$inference" ops --size 512 768 "${peers[@]}" --energy 0
    bench ops-256 90 "$inference" ops --size 256 256 "${peers[@]}" --energy 0
}

part_network() {
    backends_here
    # A job's results are written once all its contenders are timed: what takes minutes to compile has a step of its own.
    bench train 90 "$training" train --size 128 128 --batch 64 --compare channels_last,eager
    # Without the host's part, and then where the GPU's time goes.
    bench train-graphs 60 "$training" train --size 128 128 --batch 64 --compare channels_last --graphs
    run train-profile 90 "$python" benchmarks/train_profile.py --json "$out/train-profile.json"
    run conv3-tiles 40 "$python" benchmarks/conv3_tiles.py --json "$out/conv3-tiles.json"
    bench ops-gradients 60 "$training" ops --backward --only weight_gradient,batch_norm --size 512 768 \
        --compare channels_last,eager --energy 0
    # Triton's gradients of convolutions are the default where they were faster. The same with all of them on its kernels,
    # and with all on PyTorch's: without the host's part, and the memory; then by operator, without what is slowest.
    local way whole=(ops --backward --only stem,bottleneck,conv_bn_relu,concat_conv_bn_relu,upsample,head
        --size 512 768 --compare channels_last --energy 0)
    for way in kernels aten; do
        FASTDEN_BACKWARD=$way bench "train-$way" 60 "$training" train --size 128 128 --batch 64 \
            --compare channels_last --graphs
    done
    bench ops-backward 100 "$training" "${whole[@]}"
    for way in kernels aten; do
        FASTDEN_BACKWARD=$way bench "ops-backward-$way" 100 "$training" "${whole[@]}"
    done
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
    bench train-compile 200 "$training" train --size 128 128 --batch 64 --compare channels_last,compile
    bench model-max-autotune 400 "$inference" model --size 2160 3840 --batch 1 \
        --compare fastden-auto,max_autotune
}

part_tune() {
    run tune 590 "$python" benchmarks/tune.py --budget "$((deadline - SECONDS > 40 ? deadline - SECONDS - 20 : 20))"
}

part_color() { train color-gpu; }
part_photo() { train photo-gpu-2 --fit; }

train() { # CONFIGURATION OPTION...: a run, or the rest of one, that ends in time; a minute and a half is for loading and saving
    local folder=$out/$1 left=$((deadline - SECONDS - 90)) rest=("${@:2}")
    [[ -e $folder/checkpoints/last.ckpt ]] && rest+=(--resume)
    ((left > 0)) || left=0
    # On PyTorch: validations would take proven kernels, which are compiled on the run's clock.
    # shellcheck disable=SC2086 # TRAINING may hold several options
    FASTDEN_BACKEND=torch run "train-${1%%-*}" 900 "$python" -m fastden train "benchmarks/training/$1.yaml" \
        --accelerator gpu --devices 1 --set output="$folder" workers="$(($(nproc) > 1 ? $(nproc) - 1 : 1))" \
        ${DATA:+"data=$(data_of "$1")"} --minutes "$(python3 -c "print($left / 60)")" "${rest[@]}" ${TRAINING-}
}

data_of() { # CONFIGURATION: its folders of photographs below DATA
    case $1 in color*) echo "[$DATA/bsds432, $DATA/photos, $DATA/free]" ;; *) echo "[$DATA/photos, $DATA/free]" ;; esac
}

trap keep EXIT
export FASTDEN_TUNED=$out/tuned.json

timeout -k 5 120 "$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"' || exit 1
# fastden.kernels is there only where fastden is installed, which may be another checkout. The extension is built by a
# step of its own, for this GPU alone.
of_this_checkout=$(
    cat <<'PYTHON'
import sys
from pathlib import Path
import fastden, fastden.kernels

for module in (fastden, fastden.kernels):
    if Path(module.__file__).resolve().parent.parent != Path(sys.argv[1]).resolve():
        sys.exit(f"{module.__name__} is {module.__file__}; accepted: that of {sys.argv[1]}")
PYTHON
)
if ! "$python" -c "$of_this_checkout" "$PWD" 2>/dev/null; then
    FASTDEN_BUILD=none timeout 60 "$python" -m pip install --quiet --no-deps --no-build-isolation -e . &&
        "$python" -c "$of_this_checkout" "$PWD" || exit 1
fi
"$python" - "${parts[@]}" <<'PYTHON'
import sys
from importlib.util import find_spec

needs = {"typer": "all", "rich": "all", "safetensors": "all", "huggingface_hub": "all", "skimage": "all", "triton": "all"}
# typer imports pydantic from 0.29 on.
needs |= {"pydantic": "all, training", "pyvips": "tests-gpu, training", "tifftools": "tests-gpu, training"}
needs |= {"pytest": "tests", "hypothesis": "tests", "xdist": "tests (quicker)", "ninja": "first", "pynvml": "sensors"}
if {"color", "photo"} & set(sys.argv[1:]):
    needs |= dict.fromkeys(("lightning", "tensorboard", "yaml", "torchmetrics"), "training")
lacking = [f"{name} ({what})" for name, what in needs.items() if find_spec(name) is None]
print("packages that are missing:", ", ".join(lacking) or "none")
PYTHON
# Tiles of other kernels are refused at every launch, and those of another kind of GPU are not used.
if [[ -e $FASTDEN_TUNED ]]; then
    timeout -k 5 60 "$python" -c 'from fastden.kernels import _tuned; raise SystemExit(not _tuned._table(0))'
    status=$?
    if ((status != 0 && status != 124 && status != 137)); then # the last two: it hung
        mv "$FASTDEN_TUNED" "$out/tuned-other.json"
        echo "note: $FASTDEN_TUNED holds no tiles of these kernels on this GPU; now it is tuned-other.json" >&2
    fi
fi
gpu=$(timeout -k 5 60 "$python" -c 'import torch; print(torch.cuda.get_device_name())')
# As fastden.bench.machine has it: results are no part of what runs.
# A copy of a checkout may lose the modes of its files: they are no change.
commit=$(git describe --always 2>/dev/null)
changed=(git -c core.fileMode=false diff HEAD)
what=(-- :/ ':(top,exclude)benchmarks/results')
if [[ -n $commit ]] && ! "${changed[@]}" --quiet "${what[@]}"; then
    commit=$commit-dirty
    "${changed[@]}" --raw "${what[@]}" | head >&2
fi
if [[ -z $commit || $commit == *-dirty ]]; then
    echo "note: the commit is '$commit'; benchmarks/prove.py accepts results of a clean one alone" >&2
fi
python3 - "$out/status.json" "$commit" "$gpu" <<'PYTHON'
import json, pathlib, sys
file, commit, gpu = pathlib.Path(sys.argv[1]), *sys.argv[2:]
found = json.loads(file.read_text()) if file.exists() else {}
# What passed at another commit, or on another GPU, says nothing of this one.
if (found.get("commit"), found.get("gpu")) != (commit, gpu):
    found = {"commit": commit, "gpu": gpu}
part = file.with_suffix(".part")
part.write_text(json.dumps(found, indent=1) + "\n")
part.replace(file)
PYTHON
timeout -k 5 30 nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv | tee "$out/gpu.txt"
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n "$(($(nproc) < 12 ? $(nproc) : 12))")
# The search for the fastest form takes minutes: it comes last.
peers=(--compare channels_last,compile,eager)
rivals=(--compare fastden-auto,channels_last,compile,fused_compile,eager)

for part in "${parts[@]}"; do
    record_tiles
    "part_$part"
    keep
done
python3 - "$out/status.json" "${steps[@]}" <<'PYTHON'
import json, sys
found = json.load(open(sys.argv[1]))
status = {name: found.get(name, "did not run") for name in sys.argv[2:]}
wrong = [f"failed: {name} ({ended})" for name, ended in status.items() if ended != "passed"]
print("\n".join(wrong) or "all passed")
sys.exit(bool(wrong))
PYTHON
