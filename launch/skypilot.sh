#!/usr/bin/env bash
# A managed job for SkyPilot, on any cloud that it knows: prints its task as YAML, or launches it.
#
#   launch/skypilot.sh [options] -- --config FILE.py[:ARG] --workdir /lmjax/RUN [--config.a=b …]
#
# --name NAME           (lmjax)
# --accelerators A:N    of each node, as H100:8, A100-80GB:8, tpu-v6e-8
# --nodes N             (1); of several, each runs one process
# --spot                machines that may be taken away
# --infra WHERE         as gcp/us-central1, aws, k8s (the cheapest)
# --bucket URL          as gs://NAME or s3://NAME: seen by a single node as /lmjax, where --workdir may be; what is
#                       written there is copied to the bucket soon after.  Several nodes need --workdir gs://…
# --install COMMAND     run once on each node in a copy of this code; in it and in the run, ~/lmjax-venv/bin is first in
#                       PATH (by default a Python 3.12 is put there, with the extra for the accelerator and 'gcs')
# --module NAME         the command: python -m NAME (lmjax.main)
# --launch              sky jobs launch, instead of printing
# --dry_run             with --launch: print the commands that would be run
#
# SkyPilot (0.14 has been looked at) starts the job again when its machines are taken away, and when a node leaves with
# code 75, for which it knows no limit.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=options.sh
. "$(dirname "$0")/options.sh"

declare -A o=([name]=lmjax [accelerators]='' [nodes]=1 [spot]=no [infra]='' [bucket]='' [install]=''
  [module]=lmjax.main [launch]=no [dry_run]=no)
read_options "$@"
need accelerators
number nodes 1
[[ ${o[name]} =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
  mistake "--name=${o[name]@Q} must be of a-z, 0-9 and -, and begin with a letter"
[[ ! ${o[bucket]} || ${o[bucket]} =~ ^[a-z0-9]+://[^/]+ ]] || mistake "--bucket=${o[bucket]@Q} is not like gs://NAME"
[[ ! ${o[bucket]} || ${o[nodes]} == 1 ]] || mistake '--bucket is for one node: give several a --workdir gs://…'
((${#arguments[@]})) || mistake 'nothing stands behind --: what is to run?'
utf8 "${o[@]}" "${arguments[@]}"

extra=gpu
[[ ${o[accelerators]} != tpu-* ]] || extra=tpu
[[ ${o[install]} ]] || o[install]="PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv &&
  python3 -m uv venv --quiet --allow-existing --python 3.12 ~/lmjax-venv &&
  python3 -m uv pip install --quiet --python ~/lmjax-venv -e '.[$extra,gcs]'"
# shellcheck disable=SC2016 # it is expanded there
path='export PATH=~/lmjax-venv/bin:$PATH'
meet='' # the processes of a TPU find each other
# shellcheck disable=SC2016 # it is expanded there
[[ ${o[nodes]} == 1 || $extra == tpu ]] ||
  meet=' --coordinator="$(head -n 1 <<< "$SKYPILOT_NODE_IPS"):10077" --processes="$SKYPILOT_NUM_NODES" --process="$SKYPILOT_NODE_RANK"'
here=$(cd "$(dirname "$0")/.." && pwd)

task() {
  cat << YAML
name: ${o[name]}
num_nodes: ${o[nodes]}
workdir: $(json "$here")
resources:
  accelerators: $(json "${o[accelerators]}")
  use_spot: $([[ ${o[spot]} == yes ]] && echo true || echo false)
YAML
  [[ ! ${o[infra]} ]] || echo "  infra: $(json "${o[infra]}")"
  cat << YAML
  job_recovery:
    recover_on_exit_codes: [75]
YAML
  [[ ! ${o[bucket]} ]] || cat << YAML
file_mounts:
  /lmjax:
    source: $(json "${o[bucket]}")
    mode: MOUNT_CACHED
YAML
  cat << YAML
setup: $(json "$path"$'\n'"${o[install]}")
run: $(json "$path"$'\n'"python -m $(quoted "${o[module]}")$meet $(quoted "${arguments[@]}")")
YAML
}

yaml=$(task)
file=$HOME/.cache/lmjax/launch/${o[name]}.yaml
launch=(sky jobs launch --yes "--name=${o[name]}" "$file")
if [[ ${o[launch]} == no ]]; then
  printf '%s\n' "$yaml"
elif [[ ${o[dry_run]} == yes ]]; then
  quoted mkdir -p "${file%/*}"
  printf 'cat > %q <<< %q\n' "$file" "$yaml"
  quoted "${launch[@]}"
else
  type -P sky > /dev/null || mistake 'there is no sky here: pip install skypilot'
  mkdir -p "${file%/*}"
  printf '%s\n' "$yaml" > "$file"
  "${launch[@]}"
fi
