#!/usr/bin/env bash
# The pipeline under Slurm, on one node or several; it saves and requeues itself when its time ends or it is preempted.
# Edit the lines that say so, then, from the repository's root:  sbatch docs/slurm.sh        (docs/cluster.md explains)
#SBATCH --job-name=milan
#SBATCH --nodes=2              # edit; 1 works, too
#SBATCH --ntasks-per-node=1    # one task on each node: torchrun, which starts a process for each GPU
#SBATCH --gpus-per-node=8      # edit
#SBATCH --cpus-per-task=104    # edit: GPUs x (runtime.workers + 1)
#SBATCH --time=24:00:00        # edit; a run may take many such turns
#SBATCH --signal=B:TERM@300    # seconds before the end: ten steps and a save must fit in
#SBATCH --requeue
#SBATCH --open-mode=append     # one log for all turns
#SBATCH --output=slurm-%j.log

set -um # -m: DVC and what it starts are a process group of their own, which can be signalled whole
cd "${SLURM_SUBMIT_DIR:?submit this file with sbatch, from the root of the repository}" || exit
export PATH="$PWD/.venv/bin:$PATH"

# edit: the scale and the data. A run continues with another number of nodes or GPUs.
pipeline=(dvc exp run -S scale=paper -S data.imagenet=/path/to/imagenet -S data.ade20k=/path/to/ADEChallengeData2016)

launcher=(srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --cpus-per-task="$SLURM_CPUS_PER_TASK"
    torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" --rdzv-backend=c10d
    --rdzv-endpoint="$(hostname):29500" --rdzv-id="$SLURM_JOB_ID" --shutdown-timeout=240 --no-python)
export MILAN_LAUNCHER="${launcher[*]}"       # dvc.yaml puts it before the command of every stage that trains
export MILAN_PIPELINE="slurm-$SLURM_JOB_ID"  # the name under which MLflow groups the runs of all turns

rm -f .scratch/preempted
"${pipeline[@]}" &
dvc=$!
stopped=no
# To DVC as Ctrl-C: it waits for its stage, which saves and ends. A stage under srun gets the signal through its torchruns.
trap 'stopped=yes; kill -INT -- "-$dvc"; scancel --signal=TERM "$SLURM_JOB_ID"' TERM
wait "$dvc"
status=$?
while kill -0 "$dvc" 2>/dev/null; do # the signal ended the waiting, not the pipeline
    wait "$dvc"
    status=$?
done

# DVC does not pass on its stage's exit status 75; a stage that a signal stopped on any node leaves this file.
if [ "$stopped" = yes ] || [ -e .scratch/preempted ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit
fi
exit "$status"
