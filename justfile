# Short names for what one does often; `just` lists them.

default:
    @just --list

# Everything that CI checks
ci:
    ./.ci/run

# The tests, as the README says
test:
    cargo test --release --workspace

# The whole story on the embedded model
demo:
    cargo run --release -- demo

# The speeds that the README reports
bench:
    cargo run --release -- bench --model-shape tinyllama-1.1b --threads 2

# The Python package, built for work on it into the active virtual environment, and its tests
python:
    maturin develop --release
    pytest -q

# Rewrite vectors/ (only when the format changes)
vectors:
    cargo run --release -p codecllm-codec --example make_vectors

# Fuzz one target for ten minutes (needs cargo-fuzz)
fuzz target="encoded_tensor" seconds="600":
    RUSTC_BOOTSTRAP=1 cargo fuzz run {{target}} --sanitizer none -- -max_total_time={{seconds}}
