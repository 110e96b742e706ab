#!/usr/bin/env bash
# All checks and benches that need a GPU, in one call, on a machine that has one and Rust.
#
#   scripts/gpu.sh [FOLDER]   results go to FOLDER (default: target/gpu)
#
# nvCOMP is tested and measured where it is found (docs/cuda.md): pip install 'nvidia-libnvcomp-cu13>=6,<7', CODECLLM_NVCOMP=.../libnvcomp.so.6
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-target/gpu}
mkdir -p "$out"
export CODECLLM_REQUIRE_CUDA=1

# PyTorch on the GPU: with a wheel from `maturin build --release` where the machine that has the GPU has no Rust. CODECLLM_WHEEL names it.
if [[ -n ${CODECLLM_WHEEL:-} ]]; then
    site=$(realpath "$out")/site
    python3 -m pip install -q --no-deps --no-index --target "$site" --upgrade "$CODECLLM_WHEEL"
    export PYTHONPATH=$site
    python3 -m pytest -q -m cuda python/tests 2>&1 | tee "$out/python.log"
    # torchao and bitsandbytes, too, where they are installed.
    python3 -m codecllm.bench --shape llama-3-8b --json | tee "$out/python-llama-3-8b.json"
    exit
fi
cargo test --release -p codecllm-engine --lib cuda -- --nocapture 2>&1 | tee "$out/kernels.log"
# The same kernels as NVRTC compiles them.
nvrtc=false
python3 -c 'import ctypes; ctypes.CDLL("libnvrtc.so.13")' 2>/dev/null && nvrtc=true
if $nvrtc; then
    CODECLLM_NVRTC=1 cargo test --release -p codecllm-engine --lib cuda::encoded::tests::decodes -- --nocapture 2>&1 |
        tee "$out/kernels-nvrtc.log"
else
    echo 'NVRTC is not installed: its kernels and racecheck skipped'
fi
# Golden vectors and others whose payload is noise, and attention: nothing out of bounds; and no races, which take long to look for, so in the vectors alone. Racecheck only
# follows barriers at which every lane arrives, so NVRTC builds the kernels with such ones.
if command -v compute-sanitizer >/dev/null; then
    sanitize() { # tool, test
        CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="compute-sanitizer --tool $1 --error-exitcode 1" \
            cargo test --release -p codecllm-engine --lib "cuda::$2" 2>&1 | tee "$out/$1-${2%%::*}.log"
    }
    sanitize memcheck encoded::tests::a_corrupt
    sanitize memcheck backend::tests::attention
    if $nvrtc; then CODECLLM_NVRTC=1 CODECLLM_NVRTC_OPTIONS=-DRACECHECK sanitize racecheck encoded::tests::a_corrupt_vector; fi
else
    echo 'compute-sanitizer is not installed: memcheck and racecheck skipped'
fi
cargo test --release -p codecllm-engine --test cuda_model -- --nocapture 2>&1 | tee "$out/models.log"
cargo test --release -p codecllm-engine --lib cuda::sample::tests::bench -- --ignored --nocapture 2>&1 | tee "$out/draws.log"
cargo run --release -- verify assets/tales-5m --device cuda --json | tee "$out/verify.json"
for cache in none lossless; do
    cargo run --release -- run assets/tales-5m --device cuda --vram 2 --cache "$cache" -p 'Once upon a time' --temperature 0.8 --json |
        tee "$out/cache-$cache.json"
done
cargo run --release -- demo --device cuda --json | tee "$out/demo.json"
cargo run --release -- bench --device cuda --json | tee "$out/bench.json"
scripts/chart.py "$out/bench.json" >"$out/gpu.svg"
