#!/usr/bin/env bash
# A run on TPU VMs: creates them, copies this code there, runs it on all hosts, and deletes them at the end.
#
#   launch/tpu_vm.sh [options] -- --config FILE.py[:ARG] --workdir gs://BUCKET/RUN [--config.a=b …]
#
# --name NAME               of the queued resource and of the TPU
# --zone ZONE               where, as us-central1-a
# --project PROJECT         whose (what gcloud is configured for)
# --accelerator_type TYPE   as v5litepod-16, v6e-8
# --runtime_version NAME    as v2-alpha-tpuv5-lite, v2-alpha-tpuv6e
# --spot                    what may be taken away; it is then deleted, and asked for again
# --existing                the TPU VM is there already: neither create nor delete it
# --keep                    do not delete it at the end
# --install COMMAND         run on every host in the copy of this code; in it and in the run, ~/lmjax-venv/bin is
#                           first in PATH (by default a Python 3.12 is put there, with '.[tpu,gcs]')
# --retries N               how often in a row it is tried again, after code 75 or when the machines are gone (10)
# --pause S                 seconds before that (30)
# --steady S                what ran for S seconds (600) does not count among the retries
# --poll S                  how often it is asked whether the machines are there (30)
# --module NAME             the command: python -m NAME (lmjax.main)
# --dry_run                 print what would be run, if nothing fails
#
# The code goes there as one archive of lmjax/, experiments/ and what pip needs, so that what runs is what is here, and
# no host needs access to a repository.  The run outlives the connection: if that breaks it is found again, and the
# same command with --existing finds it too.  Ctrl-C, SIGTERM and a closed terminal end this script, which then deletes
# what it has created, without --keep.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=options.sh
. "$(dirname "$0")/options.sh"

# The images come with a Python that is too old.
declare -A o=([name]='' [zone]='' [project]='' [accelerator_type]='' [runtime_version]='' [spot]=no [existing]=no
  [keep]=no [retries]=10 [pause]=30 [steady]=600 [poll]=30 [module]=lmjax.main [dry_run]=no
  [install]="PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv &&
    python3 -m uv venv --quiet --allow-existing --python 3.12 ~/lmjax-venv &&
    python3 -m uv pip install --quiet --python ~/lmjax-venv -e '.[tpu,gcs]'")
read_options "$@"
need name zone
[[ ${o[existing]} == yes ]] || need accelerator_type runtime_version
[[ ${o[name]} =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
  mistake "--name=${o[name]@Q} must be of a-z, 0-9 and -, and begin with a letter"
number retries 0 && number pause 0 && number steady 1 && number poll 0
((${#arguments[@]})) || mistake 'nothing stands behind --: what is to run?'
[[ ${o[dry_run]} == yes ]] || type -P gcloud > /dev/null || mistake 'there is no gcloud here: install the Google Cloud CLI'

where=("--zone=${o[zone]}")
[[ ! ${o[project]} ]] || where+=("--project=${o[project]}")
tpus=(gcloud compute tpus)
describe=("${tpus[@]}" queued-resources describe "${o[name]}" "${where[@]}" '--format=value(state.state)')
# On all hosts; that one is gone is noticed within three minutes.
ssh=("${tpus[@]}" tpu-vm ssh "${o[name]}" "${where[@]}" --worker=all --ssh-flag=-oServerAliveInterval=30
  --ssh-flag=-oServerAliveCountMax=6)
here=$(cd "$(dirname "$0")" && pwd) archive=$HOME/.cache/lmjax/launch/${o[name]}/lmjax.tar.gz
follow="--command=$(quoted bash tpu_vm_host.sh run python -m "${o[module]}" "${arguments[@]}")"

created='' ready='' child=''
pack() { run mkdir -p "$(dirname "$archive")" && run tar -czf "$archive" --exclude=__pycache__ -C "$here/.." \
  LICENSE README.md pyproject.toml setup.cfg lmjax experiments; }
create() {
  local flags=("--node-id=${o[name]}" "--accelerator-type=${o[accelerator_type]}")
  [[ ${o[spot]} == no ]] || flags+=(--spot)
  created=yes
  run "${tpus[@]}" queued-resources create "${o[name]}" "${where[@]}" "${flags[@]}" \
    "--runtime-version=${o[runtime_version]}" --quiet
}
prepare() {
  run "${tpus[@]}" tpu-vm scp "$archive" "$here/tpu_vm_host.sh" "${o[name]}:" "${where[@]}" --worker=all &&
    run "${ssh[@]}" "--command=$(quoted bash tpu_vm_host.sh install "${o[install]}")" && ready=yes
}
delete() {
  created='' ready=''
  run "${tpus[@]}" queued-resources delete "${o[name]}" "${where[@]}" --force --quiet ||
    say "${o[name]} may still be there, and cost: look with \`gcloud compute tpus queued-resources list\`"
}

if [[ ${o[dry_run]} == yes ]]; then
  pack
  [[ ${o[existing]} == yes ]] || { create && run "${describe[@]}"; }
  prepare && run "${ssh[@]}" "$follow"
  [[ ${o[existing]} == yes || ${o[keep]} == yes ]] || delete
  exit
fi

state() { "${describe[@]}" 2> /dev/null || true; }
rest() { sleep "$1" & wait $!; } # which a signal ends
obtain() { # returns when the machines are there, or 75 when they will not be
  local now='' blind=0
  if [[ ! $created ]]; then
    create || now=$?
    [[ ! $now || $(state) ]] || { created='' && return "$now"; }
  fi
  until now=$(state) && [[ $now == ACTIVE ]]; do
    blind=$((${#now} ? 0 : blind + 1))
    [[ ! $now =~ ^(FAILED|SUSPEND|DELET) && $blind -lt 10 ]] || return 75
    rest "${o[poll]}"
  done
}
attempt() {
  [[ ${o[existing]} == yes ]] || obtain || return
  [[ $ready ]] || prepare || return 1
  began=$SECONDS
  set -m # a group of its own, with the ssh that gcloud starts
  "${ssh[@]}" "$follow" < /dev/null &
  child=$!
  set +m
  wait "$child"
}
# shellcheck disable=SC2317,SC2329 # the trap calls it
leave() {
  trap '' INT TERM HUP
  [[ ! $child ]] || kill -TERM -- "-$child" 2> /dev/null || true
  [[ ! $created || ${o[keep]} == yes ]] || delete
}
trap leave EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

[[ ${o[existing]} == yes || ! $(state) ]] || mistake "${o[name]} is there already: name another, or use it with --existing"
[[ ${o[existing]} == yes || ${o[keep]} == yes || " ${arguments[*]}" == *://* ]] ||
  say 'no bucket is named, and the disk is deleted with the machine: --workdir gs://BUCKET/RUN, or --keep before the --'
pack
for ((tries = 1; ; tries++)); do
  began='' code=0
  attempt || code=$?
  case $code in
    1 | 75) ;; # 1 is gcloud's
    101) code=1 && break ;;
    255) code=75 ;; # the connection's
    137 | 143) [[ ${o[spot]} == yes ]] || break ;; # killed, as by a preemption
    *) break ;;
  esac
  # What is killed again and again may have too little memory, and is no use to pay for.
  [[ ! $began || $code =~ ^1[34] ]] || ((SECONDS - began < o[steady])) || tries=1
  now=$([[ ! $created ]] || state)
  if [[ $now =~ ^(FAILED|SUSPEND|DELET) ]]; then
    say "${o[name]} is $now"
    delete
    [[ ${o[spot]} == yes ]] || break
  fi
  ((tries <= o[retries])) || break
  say "left with $code, tries again in ${o[pause]} s ($tries of ${o[retries]})"
  rest "${o[pause]}"
done
exit "$code"
