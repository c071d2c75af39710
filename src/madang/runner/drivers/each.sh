# Cells of languages that keep nothing from one to the next: each is a program of its own, run by
# the command for code. The protocol: docs/reference/drivers.md. Operations come at descriptor 3,
# standard output and error are 4 and 5 too. Arguments: that command, a folder, the version.
nonce=$MADANG_NONCE command=$1 folder=$2 interrupted=''
unset MADANG_NONCE DRIVER
trap 'interrupted=1' INT

# KIND ID WHAT TEXT
frame() {
  size=$(LC_ALL=C; printf '%s' "${#4}")
  printf '\036%s %s %s %s %s\n%s\n' "$nonce" "$1" "$2" "$3" "$size" "$4" >&4
}
figures() {
  IFS=' ' read -r wall _ </proc/uptime
  wall=${wall%.*}${wall#*.}0000
  IFS= read -r stat <"/proc/$$/stat"
  set -- ${stat##*) }
  cpu=$(((${12} + ${13} + ${14} + ${15}) * 10000)) memory=$((${22} * 4096))
}

run() {
  interrupted=''
  frame begin "$1" - ''
  figures
  began=$wall used=$cpu
  mkdir -p "$folder/made"
  {
    (trap - INT; TMPDIR=$folder/made exec /bin/sh -c "$command" code "$2" </dev/null 2>&1 >&4 3<&- 5>&-)
    echo "$?" >"$folder/status"
  } | tee -i "$folder/said" >&5
  rm -rf "$folder/made"
  IFS= read -r status <"$folder/status"
  result=ok
  if [ -n "$interrupted" ]; then
    result=error
    frame error "$1" - "Interrupted
The cell was interrupted."
  elif [ "$status" -ne 0 ]; then
    result=error
    line=$(sed -n 's/^.*\<\(code\|[Mm]ain\)\(\.[a-z]*\)\{0,1\}[:(]\([0-9][0-9]*\).*$/\3/p' "$folder/said" | head -n 1)
    [ -n "$line" ] || line=$(sed -n 's/^.*\<line \([0-9][0-9]*\).*$/\1/p' "$folder/said" | head -n 1)
    text=$(grep -i -m 1 'error\|panic\|exception' "$folder/said" || tail -n 1 "$folder/said")
    frame error "$1" "${line:--}" "ExitStatus
${text:-The program ended with $status.}
$(tail -n 50 "$folder/said")"
  fi
  figures
  printf '\036%s fence %s - 0\n\n' "$nonce" "$1" >&5
  frame done "$1" "$result" "wall_us=$((wall - began))
cpu_us=$((cpu - used))
mem_bytes=$memory"
}

frame ready - - "$3"
while :; do
  interrupted=''
  IFS=' ' read -r op id size <&3 || { [ -n "$interrupted" ] || exit 0; continue; }
  text=
  [ "$size" = 0 ] || text=$(dd bs=1 count="$size" <&3 2>/dev/null; printf x)
  text=${text%x}
  case $op in
    run) run "$id" "$text" ;;
    complete) frame completions "$id" "${text%%
*},${text%%
*}" '' ;;
    inspect) frame inspection "$id" none '' ;;
    quit) exit 0 ;;
  esac
done
