# The body of stage1.sh, stage2.sh and stage3.sh, which say only what they ask of SLURM and which STAGE they are.
#
# RUN         the run's folder; stage k works in RUN/stagek and starts from RUN/stage(k-1)/stair. Needed.
# DATA_TRAIN  shard spec of the training data, or a mixture '{name: spec, ...}'. Needed (site.sh may set it).
# DATA_VAL    '{name: spec, ...}', or one spec. Needed (site.sh may set it).
# STRATEGY    ddp or fsdp2: an overlay in configs/hardware; ddp if not set.
# RECIPE      a folder in configs with a file for each stage, laid over it: paper, small. None if not set.
# Words after the script go to the command: sbatch slurm/stage2.sh --data.workers 12
# In an array job (sbatch --array=0-4) the task's number is the seed, and RUN/seedN the run's folder.
set -u

refuse() {
    echo "stair, stage $STAGE: $*" >&2
    exit 2
}

# SLURM signals steps, but not every version only these; here there is nothing yet to save
trap '' USR1
export STAIR_HOME
cd "$STAIR_HOME" || refuse "no checkout at STAIR_HOME=$STAIR_HOME"
set +u # what a site loads may ask for variables that are not set
source slurm/site.sh
set -u

# ---- what was asked for

[ -n "${RUN:-}" ] || refuse "RUN is not set: give the run's folder, RUN=runs/mine sbatch slurm/stage$STAGE.sh"
[ -n "${DATA_TRAIN:-}" ] || refuse "DATA_TRAIN is not set: give a shard spec such as 'shards/{0000..0999}.tar', here or in slurm/site.sh"
[ -n "${DATA_VAL:-}" ] || refuse "DATA_VAL is not set: give '{coco: val/*.tar}', here or in slurm/site.sh"
case "$DATA_VAL" in
    "{"*:*) ;;
    *) DATA_VAL="{val: '$DATA_VAL'}" ;;
esac
STRATEGY="${STRATEGY:-ddp}"
[ -f "configs/hardware/$STRATEGY.yaml" ] || refuse "STRATEGY=$STRATEGY: there is no configs/hardware/$STRATEGY.yaml; known are ddp and fsdp2"
recipe=()
if [ -n "${RECIPE:-}" ]; then
    recipe=(--config "configs/$RECIPE/stage$STAGE.yaml")
    [ -f "${recipe[1]}" ] || refuse "RECIPE=$RECIPE: there is no ${recipe[1]}"
fi
for word in "$@"; do
    case "$word" in
        --trainer.devices* | --trainer.num_nodes* | --trainer.strategy* | --run | --run=*)
            refuse "$word: the job says that itself. Give --nodes and --ntasks-per-node to sbatch, RUN and STRATEGY in the environment" ;;
    esac
done
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    RUN="$RUN/seed$SLURM_ARRAY_TASK_ID"
    set -- --seed_everything "$SLURM_ARRAY_TASK_ID" --data.seed "$SLURM_ARRAY_TASK_ID" "$@"
fi

# ---- whether it can work; each of these would otherwise fail on every rank, or wait for ever

[ -n "${SLURM_JOB_ID:-}" ] || refuse "this is no SLURM job: sbatch slurm/stage$STAGE.sh. Without SLURM: lightning fit --config configs/stage$STAGE.yaml --run $RUN ..."
[ -n "${SLURM_NTASKS_PER_NODE:-}" ] || refuse "no tasks per node given: sbatch --ntasks-per-node=N, one for each GPU of a node"
[ "${SLURM_NTASKS:-0}" -eq $((SLURM_NNODES * SLURM_NTASKS_PER_NODE)) ] ||
    refuse "$SLURM_NTASKS tasks on $SLURM_NNODES nodes, wanted $SLURM_NTASKS_PER_NODE on each: give --nodes and --ntasks-per-node, not --ntasks"
if [ -n "${SLURM_GPUS_ON_NODE:-}" ] && [ "$SLURM_GPUS_ON_NODE" -ne "$SLURM_NTASKS_PER_NODE" ]; then
    [ "$SLURM_GPUS_ON_NODE" -gt "$SLURM_NTASKS_PER_NODE" ] ||
        refuse "$SLURM_NTASKS_PER_NODE tasks but $SLURM_GPUS_ON_NODE GPUs on a node, and each task drives one: give --ntasks-per-node and --gpus-per-node the same number"
    echo "stair, stage $STAGE: only $SLURM_NTASKS_PER_NODE of the $SLURM_GPUS_ON_NODE GPUs of a node are used: give --ntasks-per-node and --gpus-per-node the same number" >&2
fi
case "${SLURM_JOB_NAME:-}" in
    bash | interactive) refuse "a job named $SLURM_JOB_NAME is not taken for a SLURM job by Lightning: every task would train alone. Give another --job-name" ;;
esac
command -v lightning > /dev/null || refuse "no command 'lightning': run \`make setup\` in the checkout, and let slurm/site.sh activate it"
python slurm/preflight.py "$STAGE" "$RUN" "$DATA_TRAIN" "$DATA_VAL" \
    --config "configs/stage$STAGE.yaml" "${recipe[@]}" --config "configs/hardware/$STRATEGY.yaml" "$@"
case $? in
    0) ;;
    2) exit 2 ;; # it has said why
    *) refuse "slurm/preflight.py could not check the job; does Python have what \`make setup\` installs? See above" ;;
esac

# ---- train

command=(
    lightning fit --config "configs/stage$STAGE.yaml" "${recipe[@]}" --config "configs/hardware/$STRATEGY.yaml"
    --ckpt_path last "$@"
    --run "$RUN" --data.train "$DATA_TRAIN" --data.val "$DATA_VAL"
    --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE"
)
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun has not inherited it since SLURM 22.05
echo "stair, stage $STAGE: job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), ${SLURM_JOB_NODELIST:-}:"
echo "srun ${command[*]@Q}"
# a signal that comes before Python listens waits, where `env` can say so (coreutils 8.31); else SIGUSR1 does no harm until
# Python's first line (stair.cli.hold_signals)
hold=()
env --block-signal=USR1 true 2> /dev/null && hold=(env --block-signal=USR1 --block-signal=TERM)
exec srun --kill-on-bad-exit=1 bash -c 'trap "" USR1; exec "$@"' stage "${hold[@]}" "${command[@]}"
