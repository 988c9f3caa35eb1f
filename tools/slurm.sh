#!/bin/bash
#SBATCH --job-name=nla
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
#SBATCH --output=nla-%j.log
# sbatch --nodes N --gpus-per-node G --ntasks-per-node G tools/slurm.sh train rl --config=... --out SHARED_DIR
#
# Two minutes before the time limit, and when the job is preempted, every process gets SIGTERM, saves and exits with 75.
# The job is then put back into the queue, and the same command goes on from its checkpoint.
set -u
srun --kill-on-bad-exit=1 "${NLA:-nla}" "$@"
code=$?
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
