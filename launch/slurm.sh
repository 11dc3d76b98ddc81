#!/usr/bin/env bash
# A job, or an array of jobs, for SLURM: started again after code 75, and saved before its time is up.
#
#   launch/slurm.sh [options] -- --config FILE.py[:ARG] --workdir DIR [--config.a=b …]
#   launch/slurm.sh [options] --array FILE
#
# --array FILE         line k of FILE is the shell command of task k; a hidden copy is kept beside it
# --at_most M          so many of the array at once (all)
# --nodes N            of each job (1)
# --tasks_per_node N   processes on each node (1), which find each other
# --cpus N             for each process
# --gpus N             of each node, or KIND:N
# --time T             30 are minutes, 1-12:00:00 a day and a half
# --partition NAME     where
# --name NAME          of the job (lmjax)
# --log FILE           what it prints, as sbatch --output names it (slurm-%j.out, slurm-%A_%a.out)
# --grace S            so many seconds before its time is up it is told to save (120)
# --retries N          how often a job is queued again that left with 75 of its own accord (10)
# --wait               wait for the end, and leave with the job's exit code, of an array with the highest
# --module NAME        the command: python -m NAME (lmjax.main)
# --dry_run            print what would be run
#
# Accounts, queues, memory and more: sbatch reads SBATCH_ACCOUNT, SBATCH_QOS, SBATCH_MEM_PER_NODE, … (man sbatch).
# The job runs in this directory, with this environment, and its workdir must be seen by all nodes.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=options.sh
. "$(dirname "$0")/options.sh"

declare -A o=([array]='' [at_most]='' [nodes]=1 [tasks_per_node]=1 [cpus]='' [gpus]='' [time]='' [partition]=''
  [name]=lmjax [log]='' [grace]=120 [retries]=10 [wait]=no [module]=lmjax.main [dry_run]=no)
read_options "$@"
number nodes 1 && number tasks_per_node 1 && number grace 1 && number retries 0
[[ ! ${o[cpus]} ]] || number cpus 1

flags=("--job-name=${o[name]}" "--nodes=${o[nodes]}" "--ntasks-per-node=${o[tasks_per_node]}"
  --requeue --open-mode=append "--signal=B:TERM@${o[grace]}")
[[ ! ${o[cpus]} ]] || flags+=("--cpus-per-task=${o[cpus]}")
[[ ! ${o[gpus]} ]] || flags+=("--gpus-per-node=${o[gpus]}")
[[ ! ${o[time]} ]] || flags+=("--time=${o[time]}")
[[ ! ${o[partition]} ]] || flags+=("--partition=${o[partition]}")
[[ ! ${o[log]} ]] || flags+=("--output=${o[log]}")
[[ ${o[wait]} == no ]] || flags+=(--wait)

if [[ ${o[array]} ]]; then
  ((${#arguments[@]} == 0)) || mistake 'the commands are those in --array: nothing may stand behind --'
  [[ -f ${o[array]} && -r ${o[array]} ]] || mistake "--array=${o[array]@Q} is not a file that can be read"
  tasks=$(grep -c '' "${o[array]}") || mistake "--array=${o[array]@Q} has no lines"
  [[ ! ${o[at_most]} ]] || number at_most 1
  flags+=("--array=1-$tasks${o[at_most]:+%${o[at_most]}}")
  # A task that is queued again reads its line again, and FILE may be another one by then.
  file=$(realpath "${o[array]}")
  copy=${file%/*}/.${file##*/}.$(sha256sum < "$file" | cut -c1-16)
  run cp "$file" "$copy"
  arguments=(--line "$copy")
else
  ((${#arguments[@]})) || mistake 'nothing stands behind --: what is to run?'
  [[ ! ${o[at_most]} ]] || mistake '--at_most is for an --array'
  arguments=(python -m "${o[module]}" "${arguments[@]}")
fi
[[ ${o[dry_run]} == yes ]] || type -P sbatch > /dev/null || mistake 'there is no sbatch here: this is no SLURM cluster'
run sbatch "${flags[@]}" "$(realpath "$(dirname "$0")")/slurm_job.sh" "${o[retries]}" "${arguments[@]}"
