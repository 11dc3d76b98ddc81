# shellcheck shell=bash
# Sourced by the scripts beside it: how each reads its options, says mistakes, and shows or runs commands.
#
# A script declares `declare -A o=([nodes]=1 [keep]=no)`, name -> default, where `no` makes a switch;
# read_options "$@" fills it, and `arguments` with what stands behind `--`.

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || {
  echo "${0##*/}: bash 4.4 or newer is needed" >&2
  exit 2
}

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
mistake() { say "$*"; exit 2; }

read_options() {
  local name value
  local -A switches
  arguments=()
  for name in "${!o[@]}"; do [[ ${o[$name]} != no ]] || switches[$name]=yes; done
  while (($#)); do
    case $1 in
      --)
        # shellcheck disable=SC2034 # the scripts read it
        arguments=("${@:2}")
        return
        ;;
      -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;;
    esac
    # A subscript that is not a word could be an expression, which bash would evaluate.
    [[ $1 =~ ^--([a-z_]+)(=.*)?$ && -v o[${BASH_REMATCH[1]}] ]] ||
      mistake "${1@Q} is no option (--help lists them); what is to run, and its flags, stand behind --"
    name=${BASH_REMATCH[1]} value=${1#*=}
    if [[ ${switches[$name]-} ]]; then
      [[ $1 != *=* ]] || mistake "--$name takes no value"
      value=yes
    elif [[ $1 != *=* ]]; then
      [[ $# -gt 1 && $2 != -- ]] || mistake "--$name needs a value"
      value=$2
      shift
    fi
    o["$name"]=$value
    shift
  done
}

# need NAME …: these options were given.
need() {
  local name
  for name; do [[ ${o[$name]} ]] || mistake "give --$name (--help says what it is)"; done
}

# number NAME LEAST: the option is a whole number.
number() {
  [[ ${o[$1]} =~ ^[0-9]{1,9}$ && $((10#${o[$1]})) -ge $2 ]] ||
    mistake "--$1 must be a whole number of at least $2, not ${o[$1]@Q}"
  o[$1]=$((10#${o[$1]}))
}

# quoted WORD …: a line that a shell reads as these words.
quoted() {
  local line
  printf -v line '%q ' "$@"
  printf '%s\n' "${line% }"
}

# run COMMAND …: runs it, or with --dry_run shows it.
run() { if [[ ${o[dry_run]} == yes ]]; then quoted "$@"; else "$@"; fi; }

# utf8 WORD …: they are UTF-8, as `json` wants.
utf8() {
  local word
  for word; do
    iconv -f UTF-8 -t UTF-8 <<< "$word" > /dev/null 2>&1 || mistake "${word@Q} is not UTF-8"
  done
}

# json TEXT: a JSON string, which YAML reads as the same.  What YAML would not have in it, or would
# take for the end of a line, is escaped; the rest stays UTF-8, as YAML knows no surrogate pairs.
json() {
  local LC_ALL=C text=$1 i hex byte
  text=${text//\\/\\\\} text=${text//\"/\\\"}
  for ((i = 1; i < 160; i++)); do
    ((i != 32)) || i=127
    printf -v hex '%02x' "$i"
    printf -v byte '%b' "\\x$hex"
    ((i < 128)) || byte=$'\xc2'$byte
    text=${text//"$byte"/"\\u00$hex"}
  done
  text=${text//$'\xe2\x80\xa8'/\\u2028} text=${text//$'\xe2\x80\xa9'/\\u2029}
  text=${text//$'\xef\xbb\xbf'/\\ufeff} text=${text//$'\xef\xbf\xbe'/\\ufffe}
  printf '"%s"' "${text//$'\xef\xbf\xbf'/\\uffff}"
}
