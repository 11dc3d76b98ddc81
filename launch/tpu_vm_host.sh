#!/usr/bin/env bash
# What launch/tpu_vm.sh runs on every host of a TPU; it outlives the connection, and is found again by the next call.
#
#   tpu_vm_host.sh install SHELL_COMMAND       unpacks ~/lmjax.tar.gz into ~/.lmjax/source and runs the command in it
#   tpu_vm_host.sh run COMMAND [ARGUMENT …]    begins the command there, or finds it at work; shows what it prints from
#                                              now on, and leaves with its code, but with 101 instead of 1, which is
#                                              that of gcloud's own errors
#
# ~/.lmjax/log keeps what all runs have printed.  While one is at work, nothing is installed.
set -euo pipefail

install() {
  at_work && return
  mkdir -p .lmjax/source
  rm -rf .lmjax/source/{lmjax,experiments} # and nothing else: a run may be kept beside them
  tar -xzf lmjax.tar.gz -C .lmjax/source
  cd .lmjax/source
  bash -c "$1"
}

at_work() { ! flock -n .lmjax/lock true; }

run() {
  local seen code
  touch .lmjax/log
  seen=$(wc -l < .lmjax/log)
  if ! at_work; then
    rm -f .lmjax/code
    printf '%q ' "$@" > .lmjax/command
    # Only flock itself holds the lock, so that children which are left behind do not.
    # shellcheck disable=SC2016 # it is expanded there
    setsid nohup flock -no .lmjax/lock bash -c 'cd .lmjax/source; "$@"; echo $? > ~/.lmjax/code' run "$@" \
      >> .lmjax/log 2>&1 < /dev/null &
    echo $! > .lmjax/pid
  elif [[ $(printf '%q ' "$@") != "$(< .lmjax/command)" ]]; then
    echo "another command is at work here: $(< .lmjax/command)" >&2
    exit 2
  fi
  tail -n +$((seen + 1)) --pid="$(< .lmjax/pid)" -f .lmjax/log
  code=$(cat .lmjax/code 2> /dev/null || echo 75) # none: the machine has gone down, or it was killed
  exit $((code == 1 ? 101 : code))
}

main() { # read to its end before anything is run, as this file may be replaced meanwhile
  case ${1-} in
    install | run) cd && mkdir -p .lmjax && export PATH=$HOME/lmjax-venv/bin:$PATH ;;
  esac
  case ${1-} in
    install) install "$2" ;;
    run) run "${@:2}" ;;
    *) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" ;;
  esac
  exit
}

main "$@"
