#!/usr/bin/env bash
# Compiles engine/cuda/*.cu, each into one fatbin that the engine embeds. The compiler is pinned, so that the output is
# the same everywhere: python3 -m venv .nvcc && .nvcc/bin/pip install 'cuda-toolkit[nvcc,crt,cccl,cudart,nvvm]==13.0.2'
#
#   scripts/build-kernels.sh            rebuild, and print each kernel's registers and spills
#   scripts/build-kernels.sh --check    compare a fresh build with the committed one
#   scripts/build-kernels.sh --arch 90a rebuild for one architecture, for quick work (not to be committed)
#   scripts/build-kernels.sh sample     rebuild engine/cuda/sample.cu alone, with or without the options
set -euo pipefail
cd "$(dirname "$0")/.."

version=13.0.88
architectures=(80 86 89 90a 100 120)
check=false
names=()
while (($#)); do
    case $1 in
    --check) check=true ;;
    --arch) shift && architectures=("$1") ;;
    -*) echo "usage: $0 [--check] [--arch ARCHITECTURE] [NAME...]" >&2 && exit 2 ;;
    *) names+=("$1") ;;
    esac
    shift
done

if ! found=$(nvcc --version 2>/dev/null | grep -o 'V[0-9.]*$'); then
    echo "nvcc is not in PATH; this script's head says how to install it" >&2
    exit 2
elif [[ $found != "V$version" ]]; then
    echo "nvcc is $found; V$version is needed, so that the output can be compared" >&2
    exit 2
fi

targets=()
for architecture in "${architectures[@]}"; do
    targets+=(-gencode "arch=compute_$architecture,code=sm_$architecture")
done
# Newer GPUs compile this at load.
((${#architectures[@]} > 1)) && targets+=(-gencode arch=compute_120,code=compute_120)

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
if ((${#names[@]} == 0)); then
    for source in engine/cuda/*.cu; do names+=("$(basename "$source" .cu)"); done
fi
for name in "${names[@]}"; do
    source=engine/cuda/$name.cu
    nvcc -std=c++17 -O3 -Xptxas -v --threads 0 -fatbin --compress-mode=size "${targets[@]}" -o "$out/$name.fatbin" "$source" \
        2>"$out/$name.log" || { cat "$out/$name.log" >&2 && exit 1; }
    sed -nE "s/.*Compiling entry function '([^']*)' for '([^']*)'/\2 \1/p; s/.*info *: (Used .*)/    \1/p; /spill/p" \
        "$out/$name.log" | c++filt
    if $check; then
        cmp "$out/$name.fatbin" "engine/cuda/$name.fatbin" || {
            echo "engine/cuda/$name.fatbin is not what the sources yield; run $0 and commit the result" >&2
            exit 1
        }
    else
        cp "$out/$name.fatbin" "engine/cuda/$name.fatbin"
    fi
done
