#!/bin/bash
# Queues the three stages, each to start when the one before has finished:
#   RUN=runs/mine DATA_TRAIN='shards/{0000..0999}.tar' DATA_VAL='{coco: val/*.tar}' slurm/pipeline.sh [--from K] [words for the command]
# SBATCH_OPTIONS holds options of sbatch for all three: SBATCH_OPTIONS='--nodes=16 --partition=gpu'
# RECIPE=paper lays configs/paper/stageK.yaml over stage K; words after the script go to all three.
set -eu
STAIR_HOME="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export STAIR_HOME
set +eu # what a site loads may fail on a login node, or ask for variables that are not set
source "$STAIR_HOME/slurm/site.sh"
set -eu

from=1
if [ "${1:-}" = --from ]; then
    from="${2:-}"
    shift $(($# > 1 ? 2 : 1))
fi
case "$from" in
    1 | 2 | 3) ;;
    *) echo "pipeline: --from $from: wanted 1, 2 or 3" >&2 && exit 2 ;;
esac
for name in RUN DATA_TRAIN DATA_VAL; do
    if [ -z "${!name:-}" ]; then
        echo "pipeline: $name is not set; see the head of $0" >&2
        exit 2
    fi
done
export RUN DATA_TRAIN DATA_VAL
for word in "$@"; do
    case "$word" in
        *stage[123].yaml)
            echo "pipeline: $word would go to all three stages. A folder of configs with a file for each: RECIPE=paper" >&2
            exit 2 ;;
    esac
done
read -ra options <<< "${SBATCH_OPTIONS:-}"

for stage in $(seq "$from" 3); do
    # a stage whose predecessor failed is cancelled; SLURM would let it wait for ever
    job="$(sbatch --parsable --kill-on-invalid-dep=yes "${options[@]}" ${after:+"--dependency=afterok:$after"} \
        "$STAIR_HOME/slurm/stage$stage.sh" "$@")"
    after="${job%%;*}"
    echo "stage $stage: job $after"
done
