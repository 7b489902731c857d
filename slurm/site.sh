# Settings of your cluster: the only file to edit. The job of every stage sources it; pipeline.sh sources it on submission.

# Python. STAIR_HOME is the checkout.
if [ -f "${STAIR_VENV:=$STAIR_HOME/.venv}/bin/activate" ]; then
    source "$STAIR_VENV/bin/activate"
fi
# module load cuda

# Data: shard specs, absolute or relative to the folder where sbatch is called.
: "${DATA_TRAIN:=}" # '/data/cc12m/{00000..01242}.tar'
: "${DATA_VAL:=}"   # '{coco: /data/coco/val-*.tar}', or one spec

# Partition and account. `sbatch` reads these on submission. pipeline.sh sources this file; for a single stage, source it
# yourself first.
# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=mine

# Network. On most clusters, NCCL selects the interface itself. If it does not:
# export NCCL_SOCKET_IFNAME=ib0
# export NCCL_DEBUG=INFO
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
