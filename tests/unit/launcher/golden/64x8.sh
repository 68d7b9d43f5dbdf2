#!/bin/bash

# Parameters
#SBATCH --chdir=/fsx/you/regen
#SBATCH --cpus-per-task=12
#SBATCH --error=/fsx/you/regen/runs/regen_k32/launch/20260131-120000/submitit/%j_0_log.err
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --job-name=regen_k32
#SBATCH --nodes=64
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/fsx/you/regen/runs/regen_k32/launch/20260131-120000/submitit/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR2@600
#SBATCH --time=10080

# setup
export FI_PROVIDER=efa
export FI_EFA_USE_HUGE_PAGE=0
export NCCL_DEBUG=WARN
export NCCL_SOCKET_IFNAME='^docker,lo'
export OMP_NUM_THREADS=12
export PYTORCH_ALLOC_CONF=expandable_segments:True
export PYTHONSAFEPATH=1
export PYTHONPATH=/fsx/you/regen/runs/regen_k32/launch/code/0123456789ab${PYTHONPATH:+:$PYTHONPATH}
trap : TERM USR1 USR2 INT HUP  # this shell outlives the signal, to decide what follows
/fsx/you/regen/.venv/bin/python -P -m launcher.retry begin /fsx/you/regen/runs/regen_k32/launch/20260131-120000; decision=$?
[ $decision -ne 100 ] || exit 0
[ $decision -eq 0 ] || exit $decision

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /fsx/you/regen/runs/regen_k32/launch/20260131-120000/submitit/%j_%t_log.out --error /fsx/you/regen/runs/regen_k32/launch/20260131-120000/submitit/%j_%t_log.err --kill-on-bad-exit=1 --export=ALL --cpus-per-task=12 --cpu-bind=cores /fsx/you/regen/.venv/bin/python -u -m submitit.core._submit /fsx/you/regen/runs/regen_k32/launch/20260131-120000/submitit


# teardown
code=$?
/fsx/you/regen/.venv/bin/python -P -m launcher.retry end /fsx/you/regen/runs/regen_k32/launch/20260131-120000 "$code"
exit $?