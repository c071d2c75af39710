# Cells of bash, and of other shells with less: no completion, no input, and an interrupt of a loop
# ends the shell. The protocol: docs/reference/drivers.md. Operations come at descriptor 3,
# frames go to 4 and 5, which are standard output and error unless code puts others there.
madang_nonce=$MADANG_NONCE madang_cell=- madang_interrupted='' madang_line=''
madang_file=$1/cell
unset MADANG_NONCE DRIVER

# KIND ID WHAT TEXT
madang_frame() {
  madang_size=$(LC_ALL=C; printf '%s' "${#4}")
  printf '\036%s %s %s %s %s\n%s\n' "$madang_nonce" "$1" "$2" "$3" "$madang_size" "$4" >&4
}

# LENGTH: into madang_text. A whole line at a time would take from the next operation.
madang_take() {
  madang_text=
  [ "$1" = 0 ] || madang_text=$(dd bs=1 count="$1" <&3 2>/dev/null; printf x)
  madang_text=${madang_text%x}
}

madang_now() { IFS=' ' read -r madang_wall _ </proc/uptime; madang_wall=${madang_wall%.*}${madang_wall#*.}0000; }
madang_cpu() {
  IFS= read -r madang_stat <"/proc/$$/stat"
  set -- ${madang_stat##*) }
  madang_used=$(((${12} + ${13} + ${14} + ${15}) * 10000)) madang_mem=$((${22} * 4096))
}
madang_eval() {
  printf '%s\n' "$1" >"$madang_file"
  set --
  command . "$madang_file"
}
madang_complete() { madang_frame completions "$1" "${2%%
*},${2%%
*}" ''; }
madang_syntax() { madang_line=; }
trap 'madang_interrupted=1' INT

if [ -n "${BASH_VERSION-}" ]; then eval '
shopt -s expand_aliases
madang_take() { local LC_ALL=C; madang_text=; (($1 == 0)) || IFS= builtin read -r -d "" -N "$1" madang_text <&3; }
madang_now() { local now=$EPOCHREALTIME; madang_wall=${now//[.,]/}; }

# An interrupt: every function that runs is left, down to ours.
madang_skip() { [[ -z $madang_interrupted || ${#FUNCNAME[@]} -le 4 ]] || return 2; }
madang_interrupt() { madang_interrupted=1; shopt -s extdebug; trap madang_skip DEBUG; }
trap madang_interrupt INT
madang_failed() { [[ $2 != source ]] || madang_line=$1; }
set -E
trap "madang_failed \"\$LINENO\" \"\${FUNCNAME[0]-}\"" ERR
madang_syntax() {
  local said
  said=$("$BASH" -n "$madang_file" 2>&1) && return
  said=${said#*line }
  madang_line=${said%%:*} madang_name=SyntaxError
  said=${said#*: }
  madang_said=${said%%$'"'\n'"'*}
}

# What reads from standard input asks, unless something else is put there.
madang_ask() {
  local op id size
  madang_frame input "$madang_cell" "$1" "$2"
  while :; do
    # An interrupt does not end the waiting of `read`.
    until builtin read -t 0 <&3; do
      [[ -z $madang_interrupted ]] || return 1
      sleep 0.1
    done
    IFS=" " builtin read -r op id size <&3 || exit 0
    madang_take "$size"
    case $op in
      input) [[ $id != "$madang_cell" ]] || return 0 ;;
      eof) [[ $id != "$madang_cell" ]] || return 1 ;;
      quit) exit 0 ;;
    esac
  done
}
read() {
  local kind=prompt prompt="" option OPTIND=1 OPTARG
  while getopts ":a:d:ei:n:N:p:rst:u:" option; do
    case $option in
      p) prompt=$OPTARG ;;
      s) kind=password ;;
      u) builtin read "$@"; return ;;
    esac
  done
  if ! [[ /dev/stdin -ef /dev/null ]]; then builtin read "$@"; return; fi
  madang_ask "$kind" "$prompt" || return 1
  builtin read "$@" <<<"$madang_text"
}

madang_complete() {
  local cursor=${2%%$'"'\n'"'*} code=${2#*$'"'\n'"'} word found
  code=${code:0:cursor}
  word=${code##*[[:space:]|&;()<>]}
  if [[ $word == \$* ]]; then
    found=$(compgen -v -P "\$" -- "${word#\$}")
  elif [[ ${code%"$word"} =~ (^|[|\&\;\(])[[:space:]]*$ ]]; then
    found=$(compgen -A command -- "$word")
  else
    found=$(compgen -f -- "$word")
  fi
  found=$(sort -u <<<"$found" | grep -v "^\$\?madang_" | head -n 500)
  madang_frame completions "$1" "$((cursor - ${#word})),$cursor" "$found"
}
'; fi

madang_inspect() {
  madang_word=${2#*
}
  madang_word=${madang_word%%[!A-Za-z0-9_.-]*}
  if madang_said=$(LC_ALL=C type "$madang_word" 2>/dev/null); then
    madang_frame inspection "$1" found "$madang_said"
  else
    madang_frame inspection "$1" none ''
  fi
}

madang_run() {
  madang_cell=$1 madang_interrupted='' madang_line=''
  madang_frame begin "$1" - ''
  madang_now; madang_cpu
  set -- "$1" "$2" "$madang_wall" "$madang_used"
  madang_eval "$2"
  madang_status=$?
  [ -z "${BASH_VERSION-}" ] || trap - DEBUG
  # This takes the inheritance of traps away with it.
  [ -z "${BASH_VERSION-}" ] || { shopt -u extdebug; set -E; }
  madang_now; madang_cpu
  if [ -n "$madang_interrupted" ]; then
    madang_frame error "$1" - "Interrupted
The cell was interrupted."
    madang_result=error
  elif [ "$madang_status" -ne 0 ]; then
    madang_name=ExitStatus madang_said="The last command ended with $madang_status."
    madang_syntax "$2"
    madang_frame error "$1" "${madang_line:--}" "$madang_name
$madang_said
cell:${madang_line:+ line $madang_line:} $madang_said"
    madang_result=error
  else
    madang_result=ok
  fi
  printf '\036%s fence %s - 0\n\n' "$madang_nonce" "$1" >&5
  madang_frame done "$1" "$madang_result" "wall_us=$((madang_wall - $3))
cpu_us=$((madang_used - $4))
mem_bytes=$madang_mem"
  madang_cell=-
}

madang_frame ready - - "${BASH_VERSION:-sh}"
madang_loop() {
  while :; do
    IFS=' ' command read -r madang_op madang_id madang_size <&3 || {
      [ -n "$madang_interrupted" ] || exit 0
      madang_interrupted=''
      [ -z "${BASH_VERSION-}" ] || trap - DEBUG
      continue
    }
    madang_take "$madang_size"
    case $madang_op in
      run) madang_run "$madang_id" "$madang_text" ;;
      complete) madang_complete "$madang_id" "$madang_text" ;;
      inspect) madang_inspect "$madang_id" "$madang_text" ;;
      quit) exit 0 ;;
    esac
  done
}
madang_loop
