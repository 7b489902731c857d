#!/usr/bin/env bash
# Three stages of configs/scratch on real images, all 30,522 terms, on CPU cores (benchmarks/results/small_runs_2026-11-28.md).
#   benchmarks/small_runs.sh emoji_fluent runs/emoji        (or flickr8k; further arguments go to every stage)
# STAIR_SHARED_DATA is the folder of the data sets. A stage that has exported its model is not run again.
set -euo pipefail
data=$1 run=$2
shift 2
cd "$(dirname "$0")/.."
# glibc returns blocks above 32 MB to the system at once, and a B × V embedding has 31 MB: without these lines, a step
# spends much of its time on new pages (seen once, on a busy machine)
export MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=8000000000
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}
for stage in 1 2 3; do
    [ -e "$run/stage$stage/stair" ] && continue
    started=$SECONDS own=()
    for file in "configs/scratch/$data.yaml" "configs/scratch/$data.stage$stage.yaml"; do
        [ -e "$file" ] && own+=(--config "$file")
    done
    "${PYTHON:-.venv/bin/python}" main.py fit --config "configs/stage$stage.yaml" --config configs/model/tiny.yaml \
        --config "configs/data/$data.yaml" --config configs/scratch/base.yaml --config "configs/scratch/stage$stage.yaml" \
        "${own[@]}" \
        --run "$run" --ckpt_path last "$@"
    echo "stage $stage: $((SECONDS - started)) s"
done
