#!/bin/bash
# Stage 2 as a SLURM job. Submit it from the root of the checkout; run_stage.sh lists the variables:
#   RUN=runs/mine DATA_TRAIN='shards/{0000..0999}.tar' DATA_VAL='{coco: val/*.tar}' sbatch slurm/stage2.sh [arguments]
# Other sizes: sbatch --nodes=16 slurm/stage2.sh. Each task uses one GPU: set --ntasks-per-node and --gpus-per-node to the
# same number.
#SBATCH --job-name=stair-stage2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=SIGUSR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
STAGE=2
source "${STAIR_HOME:=${SLURM_SUBMIT_DIR:-.}}/slurm/run_stage.sh" || {
    echo "stair, stage $STAGE: no slurm/run_stage.sh in $STAIR_HOME: submit from the checkout's root, or set STAIR_HOME to it" >&2
    exit 2
}
