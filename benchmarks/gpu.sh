#!/usr/bin/env bash
# All that docs/benchmarks.md says of GPUs, on the one that is here: about 20 minutes on an H200.
#
#     benchmarks/gpu.sh [FOLDER]
#
# Each step writes a page of markdown, or its log, into FOLDER (gpu-tables unless told otherwise); a step that fails
# says so there, and the others go on. `PYTHON` names the interpreter, by default that of .venv.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
out=${1:-gpu-tables}
mkdir -p "$out"
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "there is no GPU here, or torch is built without CUDA: see dmquant doctor" >&2
    exit 1
}

step() { # name, seconds at most, command ...
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    printf '%s: ' "$name"
    timeout "$limit" "$@" > "$out/$name.md" 2> "$out/$name.log"
    code=$?
    printf '%d s%s\n' $((SECONDS - start)) "$([ $code = 0 ] || echo ", failed with $code, see $out/$name.log")" |
        tee -a "$out/steps.md"
}

step machine 60 "$python" -m dmquant doctor
step sums 60 "$python" benchmarks/fp8_sums.py --device cuda
step tests 240 "$python" -m pytest tests -q -k cuda
step layers 480 "$python" benchmarks/gpu_layers.py --device cuda
for recipe in rtn fast; do
    for device in cuda cpu; do
        step "run-$recipe-$device" 240 "$python" -m dmquant run emoji-pixart --recipe "$recipe" --num-prompts 16 \
            --metrics psnr --device "$device" --out "$out/$recipe-$device"
    done
done
step batch-mates 240 "$python" benchmarks/batch_mates.py --device cuda
for offload in model group; do
    step "offload-$offload" 240 "$python" -m dmquant run emoji-pixart --recipe gptq --num-prompts 16 --metrics psnr \
        --device cuda --offload "$offload" --out "$out/offload-$offload"
done
step models 180 "$python" benchmarks/gpu_models.py "$out/fast-cuda/model" "$out/rtn-cuda/model"
