#!/usr/bin/env bash
# What launch/slurm.sh hands to sbatch; it runs on the first node of a job.
#
#   slurm_job.sh RETRIES COMMAND [ARGUMENT …]
#   slurm_job.sh RETRIES --line FILE              the line of FILE whose number is that of the array task
#
# A command that leaves with 75 is queued again: always when it was told to stop, as the job's time is nearly up or
# others want its place; else RETRIES times.  A job that somebody has cancelled is not.
set -euo pipefail
case ${1-} in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;; esac

retries=$1 && shift
job=$SLURM_JOB_ID
# One task of an array has the number of the whole array, which would all be meant.
[[ ! ${SLURM_ARRAY_TASK_ID-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
if [[ $1 == --line ]]; then
  line=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$2")
  [[ $line ]] || { echo "slurm_job.sh: line $SLURM_ARRAY_TASK_ID of $2 is empty" >&2 && exit 2; }
  set -- bash -c "$line"
fi
[[ ! ${SLURM_CPUS_PER_TASK-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # which srun forgets

# srun would kill its tasks at once if it heard SIGTERM itself.
stopped=
trap 'stopped=yes; scancel --signal=TERM "$job" 2> /dev/null || true' TERM
# Where one fails, lmjax ends the others; they are left the time to say why.
srun --kill-on-bad-exit=0 "$@" &
step=$!
wait "$step" || true
while kill -0 "$step" 2> /dev/null; do wait "$step" || true; done
code=0
wait "$step" || code=$?

if [[ $code == 75 && $(squeue --noheader --jobs="$job" --format=%T) == RUNNING ]]; then
  restarts=${SLURM_RESTART_COUNT-0} # which is not set the first time
  if [[ $stopped || $restarts -lt $retries ]]; then
    echo "slurm_job.sh: left with 75, queued again" >&2
    trap '' TERM # by which SLURM ends this script
    scontrol requeue "$job" || true
  else
    echo "slurm_job.sh: left with 75, after $restarts restarts not queued again" >&2
  fi
fi
exit "$code"
