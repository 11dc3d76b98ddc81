#!/usr/bin/env bash
# Processes of one run on this machine, started again as long as they leave with code 75.
#
#   launch/local.sh [options] -- --config FILE.py[:ARG] --workdir DIR [--config.a.b=v …]
#
# --processes N     how many (1); of several, each line of output begins with the number of its process
# --devices KIND:N  devices of each process: cpu:4 are four of a CPU; gpu:2 are the next two of
#                   CUDA_VISIBLE_DEVICES, or of all, from 0 on
# --port P          where they meet on this machine (one that is free)
# --grace S         when one has ended, the others are sent SIGTERM after S seconds (30), SIGKILL after twice S
# --retries N       how often in a row it is started again (3)
# --pause S         seconds before that (10)
# --steady S        what ran for S seconds (600) does not count among the retries
# --module NAME     the command: python -m NAME (lmjax.main)
# --dry_run         print what would be run
#
# Ctrl-C, SIGTERM and SIGHUP are sent on as SIGTERM: the run is saved, and not started again.  The exit code is
# that of a process which failed by itself, else 75, which the others say when one is killed.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=options.sh
. "$(dirname "$0")/options.sh"

declare -A o=([processes]=1 [devices]='' [port]='' [grace]=30 [retries]=3 [pause]=10 [steady]=600
  [module]=lmjax.main [dry_run]=no)
read_options "$@"
number processes 1 && number grace 0 && number retries 0 && number pause 0 && number steady 1
[[ ! ${o[port]} ]] || number port 1
((${#arguments[@]})) || mistake 'nothing stands behind --: what is to run?'
[[ ${o[devices]} =~ ^((cpu|gpu):[1-9][0-9]{0,3})?$ ]] ||
  mistake "--devices=${o[devices]} is neither cpu:N nor gpu:N"
kind=${o[devices]%:*} each=${o[devices]#*:}
gpus=()
if [[ $kind == gpu ]]; then
  wanted=$((each * o[processes]))
  IFS=, read -ra gpus <<< "${CUDA_VISIBLE_DEVICES-$(seq -s, 0 $((wanted - 1)))}"
  ((${#gpus[@]} >= wanted)) ||
    mistake "${o[processes]} processes with $each GPUs are $wanted, but CUDA_VISIBLE_DEVICES has ${#gpus[@]}"
fi

free_port() { # below those that the system gives to whoever calls
  local port
  while port=$((10000 + RANDOM % 20000)) && (: < "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do :; done
  echo "$port"
}

pids=() printers=() stopped=
trap 'stopped=yes; kill -TERM "${pids[@]}" 2> /dev/null || true' INT TERM HUP

start() {
  local i port=${o[port]:-$(free_port)} line out err mine
  for ((i = 0; i < o[processes]; i++)); do
    line=(python -m "${o[module]}")
    ((o[processes] == 1)) ||
      line+=("--coordinator=localhost:$port" "--processes=${o[processes]}" "--process=$i")
    line+=("${arguments[@]}")
    case $kind in
      cpu) line=(env JAX_PLATFORMS=cpu
        XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$each" "${line[@]}") ;;
      gpu) mine=$(IFS=, && echo "${gpus[*]:i * each:each}") && line=(env "CUDA_VISIBLE_DEVICES=$mine" "${line[@]}") ;;
    esac
    if [[ ${o[dry_run]} == yes ]]; then
      run "${line[@]}"
    elif ((o[processes] == 1)); then
      "${line[@]}" &
      pids[i]=$!
    else
      exec {out}> >(trap '' INT TERM HUP && exec sed -u "s/^/[$i] /") && printers+=($!)
      exec {err}> >(trap '' INT TERM HUP && exec sed -u "s/^/[$i] /" >&2) && printers+=($!)
      "${line[@]}" 1>&"$out" 2>&"$err" &
      pids[i]=$!
      exec {out}>&- {err}>&-
    fi
  done
}

weight() { # of several codes: a failure says more than what the others say of it, and that more than a kill
  case $1 in 0) echo 0 ;; 75) echo 2 ;; *) echo $(($1 > 128 ? 1 : 3)) ;; esac
}

finish() { # waits for all, and sets `code`
  local i status since='' hand=(TERM KILL)
  code=0
  while ((${#pids[@]})); do
    sleep 0.2 || true # which Ctrl-C ends as well
    for i in "${!pids[@]}"; do
      ! kill -0 "${pids[i]}" 2> /dev/null || continue
      status=0
      wait "${pids[i]}" || status=$?
      unset 'pids[i]'
      since=${since:-$SECONDS}
      (($(weight "$status") <= $(weight "$code"))) || code=$status
    done
    if [[ $since ]] && ((${#pids[@]} && ${#hand[@]} && SECONDS - since >= o[grace])); then
      kill -"${hand[0]}" "${pids[@]}" 2> /dev/null || true
      hand=("${hand[@]:1}") since=$SECONDS
    fi
  done
}

for ((tries = 1; ; tries++)); do
  began=$SECONDS
  start
  [[ ${o[dry_run]} == no ]] || exit 0
  [[ ! $stopped ]] || kill -TERM "${pids[@]}" 2> /dev/null || true # who came while they were begun
  finish
  ((SECONDS - began < o[steady])) || tries=1
  [[ $code == 75 && ! $stopped && $tries -le ${o[retries]} ]] || break
  say "left with 75, starts again in ${o[pause]} s ($tries of ${o[retries]})"
  began=$SECONDS
  while [[ ! $stopped ]] && ((SECONDS - began < o[pause])); do sleep 0.2 || true; done
  [[ ! $stopped ]] || break
done
for ((i = 0; i < 20 && ${#printers[@]}; i++)); do # a child left behind could hold them open
  kill -0 "${printers[@]}" 2> /dev/null || break
  sleep 0.1
done
exit "$code"
