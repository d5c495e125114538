#!/usr/bin/env bash
# A recipe on several GPUs of one or more machines, under Slurm: sbatch recipes/slurm.sh wmdp-bio my-workspace
# Five minutes before its time is over the job is told to stop, keeps its checkpoint, and is queued again; it goes on from
# there. The workspace and the caches (HF_HOME, DSG_CACHE) must lie where every machine sees them.
#SBATCH --job-name=dsg
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=dsg-%j.log
set -euo pipefail

recipe=${1:?Name a recipe, such as wmdp-bio.}
workspace=${2:-dsg-workspace}
processes=${SLURM_GPUS_ON_NODE:-1}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

status=0
srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node "$processes" \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:29500" \
  -m dsg_cli run "$recipe" -w "$workspace" --resume || status=$?

# Not done, and not because of a mistake: there is a checkpoint to go on from.
if [ "$status" -ne 0 ] && compgen -G "$workspace/.*.checkpoint" > /dev/null; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
