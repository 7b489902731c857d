# The one file that a cluster edits. Every stage's job reads it, and so does pipeline.sh before it submits.

# Python. STAIR_HOME is the checkout.
if [ -f "${STAIR_VENV:=$STAIR_HOME/.venv}/bin/activate" ]; then
    source "$STAIR_VENV/bin/activate"
fi
# module load cuda

# Data: shard specs, absolute or relative to the folder where sbatch is called.
: "${DATA_TRAIN:=}" # '/data/cc12m/{00000..01242}.tar'
: "${DATA_VAL:=}"   # '{coco: /data/coco/val-*.tar}', or one spec

# Where to. `sbatch` reads these when submitting: pipeline.sh passes them on, for a single stage `source` this file first.
# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=mine

# Network. NCCL finds its way on most clusters; if it does not:
# export NCCL_SOCKET_IFNAME=ib0
# export NCCL_DEBUG=INFO
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
