#!/usr/bin/env bash
# The pipeline under Slurm, on one node or several; it saves and requeues itself when its time ends or it is preempted.
# Edit what says so, then, from the repository's root:  sbatch docs/slurm.sh        (docs/cluster.md explains)
#SBATCH --job-name=milan
#SBATCH --nodes=2              # edit; 1 is well
#SBATCH --ntasks-per-node=1    # one task a node, which starts a process for each of its GPUs
#SBATCH --gpus-per-node=8      # edit
#SBATCH --cpus-per-task=104    # edit: GPUs x (runtime.workers + 1)
#SBATCH --time=24:00:00        # edit; a run may take many such turns
#SBATCH --signal=B:TERM@300    # seconds before the end: ten steps and a save must fit in
#SBATCH --requeue
#SBATCH --open-mode=append     # one log for all turns
#SBATCH --output=slurm-%j.log

set -um # -m: a background job is a process group of its own, which can be signalled whole
cd "${SLURM_SUBMIT_DIR:?submit this file with sbatch, from the root of the repository}" || exit
export PATH="$PWD/.venv/bin:$PATH"

# edit: the scale and the data. A run continues with another number of nodes or GPUs.
pipeline=(dvc exp run -S scale=paper -S data.imagenet=/path/to/imagenet -S data.ade20k=/path/to/ADEChallengeData2016)
pipeline+=(-S "runtime.nodes=$SLURM_JOB_NUM_NODES" -S "runtime.processes=$SLURM_GPUS_ON_NODE")

rm -f .scratch/preempted
others=$((SLURM_JOB_NUM_NODES - 1))
if ((others > 0)); then # every node but the first, on which this script runs, follows
    srun --nodes="$others" --ntasks="$others" --relative=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" python -m milan.training.follow &
fi

"${pipeline[@]}" &
dvc=$!
stopped=no
trap 'stopped=yes; kill -INT -- "-$dvc"' TERM # as Ctrl-C: DVC waits for its stage, which saves and ends
wait "$dvc"
status=$?
while kill -0 "$dvc" 2>/dev/null; do # the signal ended the waiting, not the pipeline
    wait "$dvc"
    status=$?
done

python -m milan.training.follow --end
wait
# DVC does not pass on its stage's exit status 75; the stage leaves this file when a signal came to it or to another node.
if [ "$stopped" = yes ] || [ -e .scratch/preempted ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit
fi
exit "$status"
