#!/usr/bin/env bash
# All checks and benches that need a GPU, in one call, on a machine that has one and Rust.
#
#   scripts/gpu.sh [FOLDER]   results go to FOLDER (default: target/gpu)
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-target/gpu}
mkdir -p "$out"
export CODECLLM_REQUIRE_CUDA=1

cargo test --release -p codecllm-engine --lib cuda -- --nocapture 2>&1 | tee "$out/kernels.log"
cargo test --release -p codecllm-engine --test cuda_model -- --nocapture 2>&1 | tee "$out/models.log"
cargo run --release -- demo --device cuda --json | tee "$out/demo.json"
for shape in tinyllama-1.1b llama-3-8b; do
    cargo run --release -- bench --device cuda --model-shape "$shape" --json | tee "$out/$shape.json"
done
