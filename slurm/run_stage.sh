# The common part of stage1.sh, stage2.sh and stage3.sh, which contain only STAGE and the #SBATCH options.
#
# RUN         folder of the run. Stage k writes to RUN/stagek and starts from RUN/stage(k-1)/stair. Required.
# DATA_TRAIN  shard spec of the training data, or a mixture '{name: spec, ...}'. The same as --data.train.
# DATA_VAL    '{name: spec, ...}', or one spec. The same as --data.val.
# STRATEGY    ddp or fsdp2: a file in configs/hardware. Default: ddp.
# RECIPE      a folder in configs with a file for each stage, such as paper. Default: none.
# RESTARTS    maximum number of restarts after a crash. Default: 0.
# Paths are relative to the folder where sbatch was called. Arguments after the script are passed to the program and
# override the variables: sbatch slurm/stage2.sh --data.workers 12. In an array job (sbatch --array=0-4), the array index N
# is the seed, and the folder of the run is RUN/seedN.
set -u
source "$STAIR_HOME/slurm/settings.sh"

# SLURM sends the signal to the job steps and, in some versions, also to this shell, which must wait for its tasks
trap '' USR1
trap : TERM

# ---- the size of the job

[ -n "${SLURM_JOB_ID:-}" ] || refuse "not in a SLURM job: run sbatch slurm/stage$STAGE.sh. Without SLURM: lightning fit --config configs/stage$STAGE.yaml --run $RUN ..."
[ -n "${SLURM_NTASKS_PER_NODE:-}" ] || refuse "no tasks per node given: sbatch --ntasks-per-node=N, one for each GPU of a node"
[ "${SLURM_NTASKS:-0}" -eq $((SLURM_NNODES * SLURM_NTASKS_PER_NODE)) ] ||
    refuse "$SLURM_NTASKS tasks on $SLURM_NNODES nodes, expected $SLURM_NTASKS_PER_NODE on each: give --nodes and --ntasks-per-node, not --ntasks"
if [ -n "${SLURM_GPUS_ON_NODE:-}" ] && [ "$SLURM_GPUS_ON_NODE" -ne "$SLURM_NTASKS_PER_NODE" ]; then
    [ "$SLURM_GPUS_ON_NODE" -gt "$SLURM_NTASKS_PER_NODE" ] ||
        refuse "$SLURM_NTASKS_PER_NODE tasks but $SLURM_GPUS_ON_NODE GPUs on a node, and each task uses one: give --ntasks-per-node and --gpus-per-node the same number"
    echo "stair, stage $STAGE: only $SLURM_NTASKS_PER_NODE of the $SLURM_GPUS_ON_NODE GPUs of a node are used: give --ntasks-per-node and --gpus-per-node the same number" >&2
fi
case "${SLURM_JOB_NAME:-}" in
    bash | interactive) refuse "Lightning does not recognise a job named $SLURM_JOB_NAME as a SLURM job: every task would train alone. Give another --job-name" ;;
esac
me="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}"
me="${me:-$SLURM_JOB_ID}"

job_field() { # NAME: a field of `scontrol show job` for this job
    scontrol show job -o "$me" 2> /dev/null | sed -n "s/.* $1=\([^ ]*\).*/\1/p"
}

# SLURM does not tell a job the lead time of its signal. For sbatch, SBATCH_SIGNAL overrides the line in the script
lead="${SBATCH_SIGNAL:-$(sed -n 's/^#SBATCH --signal=//p' "$0" 2> /dev/null)}"
case "$lead" in
    *@*) lead="${lead##*@}" ;;
    ?*) lead=60 ;; # SLURM's default
    *) lead=0 ;; # no signal
esac
limit="$(job_field TimeLimit)"
if [[ "$limit" =~ ^(([0-9]+)-)?([0-9]+):([0-9]+):([0-9]+)$ ]]; then
    seconds=$(((10#0${BASH_REMATCH[2]} * 24 + 10#${BASH_REMATCH[3]}) * 3600 + 10#${BASH_REMATCH[4]} * 60 + 10#${BASH_REMATCH[5]}))
    [ "$seconds" -gt "$lead" ] ||
        refuse "--time=$limit ($seconds s) is not longer than the lead of --signal ($lead s): each start would end before it trains. Give a longer --time, or a shorter lead by SBATCH_SIGNAL=SIGUSR1@60 in the environment of sbatch"
fi

# ---- the settings: resolved at the first start, or by pipeline.sh on submission. Later starts use the same settings

seeds=()
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    for arg in "$@"; do
        case "$arg" in
            --seed_everything* | --data.seed*) refuse "$arg: in an array job, the array index is the seed. Leave it out, or submit without --array" ;;
        esac
    done
    RUN="$RUN/seed$SLURM_ARRAY_TASK_ID"
    seeds=(--seed_everything "$SLURM_ARRAY_TASK_ID" --data.seed "$SLURM_ARRAY_TASK_ID")
fi
export STAIR_JOB="$RUN/jobs/stage$STAGE-$SLURM_JOB_ID"
mkdir -p "$RUN/jobs" && touch "$STAIR_JOB.start" || refuse "cannot write to $RUN: correct RUN or its permissions"
settings="${STAIR_SETTINGS:-$STAIR_JOB.yaml}"
[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || rm -f "$STAIR_JOB.restarts"
if [ -z "${STAIR_SETTINGS:-}" ] && { [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] || [ ! -f "$settings" ]; }; then
    resolve "$settings" "$@"
fi
[ -f "$settings" ] || refuse "the settings file of this job is missing: $settings. Submit it again"

# ---- train

restart() { # STATUS: queues the job again after a crash, if RESTARTS allows it
    local used
    used="$(cat "$STAIR_JOB.restarts" 2> /dev/null || echo 0)"
    [ "${RESTARTS:-0}" -gt 0 ] && [ "$(job_field JobState)" = RUNNING ] || return
    if [ -e "$STAIR_JOB.error" ]; then
        no_restart "another start would end with the same error"
    elif [ -z "$(find "$RUN/stage$STAGE" -name '*.ckpt' -newer "$STAIR_JOB.start" -print -quit 2> /dev/null)" ]; then
        no_restart "this start has written no checkpoint"
    elif [ "$used" -ge "$RESTARTS" ]; then
        no_restart "all RESTARTS=$RESTARTS are used"
    else
        echo $((used + 1)) > "$STAIR_JOB.restarts"
        echo "stair, stage $STAGE: status $1 after a crash; restart $((used + 1)) of $RESTARTS" >&2
        scontrol requeue "$me" && exit "$1"
        no_restart "SLURM does not requeue this job"
    fi
}

no_restart() { # REASON
    echo "stair, stage $STAGE: no restart: $1" >&2
}

rm -f "$STAIR_JOB.error"
command=(lightning fit --config "$settings" --run "$RUN" --ckpt_path last "${seeds[@]}")
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # since SLURM 22.05, srun does not inherit it
echo "stair, stage $STAGE: job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), ${SLURM_JOB_NODELIST:-}:"
echo "srun ${command[*]@Q}"
# block signals until Python handles them, if `env` supports it (coreutils 8.31). Otherwise SIGUSR1 is ignored until Python's
# first line (stair/launch.py)
hold=()
env --block-signal=USR1 true 2> /dev/null && hold=(env --block-signal=USR1 --block-signal=TERM)
srun --kill-on-bad-exit=1 bash -c 'trap "" USR1; exec "$@"' stage "${hold[@]}" "${command[@]}"
status=$?
[ "$status" -eq 0 ] || restart "$status"
exit "$status"
