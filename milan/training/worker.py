"""Take part, on a machine where DVC does not run, in the stages that DVC runs on another (docs/cluster.md).

    torchrun --nnodes=2 --node-rank=1 --master-addr=HEAD --nproc-per-node=8 -m milan.training.worker

It waits for one stage's torchrun on the head and ends with that stage; a shell loop repeats it.
"""

from milan.core.program import fail
from milan.training import distributed

if __name__ == "__main__":
    with distributed.torchrun():
        fail("milan.training.worker takes part in another machine's stage: start it by torchrun with a --node-rank above 0.")
