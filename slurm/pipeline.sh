#!/bin/bash
# Queues the three stages. Each starts when the previous one has finished:
#   RUN=runs/mine DATA_TRAIN='shards/{0000..0999}.tar' DATA_VAL='{coco: val/*.tar}' slurm/pipeline.sh [--from K] [--to K] [arguments]
# The settings are resolved on submission: later changes to files do not affect the jobs.
# SBATCH_OPTIONS holds the sbatch options for all stages: SBATCH_OPTIONS='--nodes=16 --partition=gpu'
# run_stage.sh lists the variables and arguments.
STAIR_HOME="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$STAIR_HOME/slurm/settings.sh"

from=1 to=3
while [[ "${1:-}" = --from || "${1:-}" = --to ]]; do
    [[ "${2:-}" =~ ^[123]$ ]] || refuse "$1 ${2:-}: expected 1, 2 or 3"
    declare "${1#--}=$2"
    shift 2
done
for arg in "$@"; do
    case "$arg" in
        *stage[123].yaml) refuse "$arg would go to all stages. A folder of configs with a file for each: RECIPE=paper" ;;
    esac
done
options=()
if [ -n "${SBATCH_OPTIONS:-}" ]; then
    parts="$(xargs -n 1 printf '%s\n' <<< "$SBATCH_OPTIONS")" || refuse "SBATCH_OPTIONS=$SBATCH_OPTIONS: a quote is not closed"
    mapfile -t options <<< "$parts"
fi
for option in "${options[@]}"; do
    case "$option" in
        --signal=*) export SBATCH_SIGNAL="${option#*=}" ;; # the jobs compare its lead time with their time limit
    esac
done

export RUN RESTARTS STRATEGY
stamp="$(date +%Y%m%d-%H%M%S)-$$"
for STAGE in $(seq "$from" "$to"); do # resolve all settings before the first job is queued
    resolve "$RUN/jobs/stage$STAGE-$stamp.yaml" "$@"
done
for STAGE in $(seq "$from" "$to"); do
    export STAIR_SETTINGS="$RUN/jobs/stage$STAGE-$stamp.yaml"
    # if a stage fails, the next one is cancelled; by default, SLURM would leave it pending forever
    job="$(sbatch --parsable --kill-on-invalid-dep=yes "${options[@]}" ${after:+"--dependency=afterok:$after"} \
        "$STAIR_HOME/slurm/stage$STAGE.sh" "$@")" || exit
    after="${job%%;*}"
    echo "stage $STAGE: job $after"
done
