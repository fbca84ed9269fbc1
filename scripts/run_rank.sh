#!/usr/bin/env bash
# One rank of a run: its cores, its log, and a note of its failure. launch.sh and torchrun start it.
#   scripts/run_rank.sh LOG_FOLDER NOTES_FOLDER BIND_CORES COMMAND...
# The log is LOG_FOLDER/train_<rank>.log. BIND_CORES: yes or no.
set -euo pipefail
logs=$1 notes=$2 bind=$3
shift 3
rank=${RANK:-0}
# What ended for good is not started again by torchrun: a mistake in the flags, a stop on request.
if [[ -s $notes/final ]]; then
    exit "$(<"$notes/final")"
fi
touch "$notes/began" "$logs/train_$rank.log"
if ((${LOCAL_RANK:-0} == 0)); then # launch.sh shows this log, from here on
    echo "$rank $(stat -c %s "$logs/train_$rank.log")" >"$notes/shown"
fi
exec >>"$logs/train_$rank.log" 2>&1
# The signals are the training's: it saves and ends, and this shell after it. Until it listens, SIGINT alone is not heard.
trap : TERM HUP USR1
trap '' INT
export FINAL_NOTE=$notes/final

# The share of local rank i of n: the i-th of n equal runs of the cores that this process may use. Numbers next to each
# other lie in one NUMA node, whose memory is then the rank's own.
share_of_cores() {
    local allowed range core cores=() count
    allowed=$(sed -n 's/^Cpus_allowed_list:[[:space:]]*//p' /proc/self/status)
    for range in ${allowed//,/ }; do
        for ((core = ${range%-*}; core <= ${range#*-}; core++)); do
            cores+=("$core")
        done
    done
    count=$((${#cores[@]} / ${LOCAL_WORLD_SIZE:-1}))
    cores=("${cores[@]:${LOCAL_RANK:-0}*count:count}")
    local IFS=,
    echo "${cores[*]}"
}

command=("$@")
if [[ $bind == yes ]]; then
    share=$(share_of_cores)
    if [[ -z $share ]]; then
        echo "rank $rank: fewer cores than ranks, none is bound"
    elif command -v taskset >/dev/null; then
        command=(taskset -c "$share" "$@")
    elif command -v numactl >/dev/null; then
        command=(numactl --physcpubind="$share" "$@")
    else
        echo "rank $rank: neither taskset nor numactl is installed, no core is bound"
    fi
fi
# The log is shown to others, a token is not.
shown=() secret=no
for word in "${command[@]}"; do
    if [[ $secret == yes ]]; then
        word='***' secret=no
    elif [[ $word =~ ^--[a-z_-]*token= ]]; then
        word="${BASH_REMATCH[0]}***"
    elif [[ $word =~ ^--[a-z_-]*token$ ]]; then
        secret=yes
    fi
    shown+=("$word")
done
echo "$(date '+%F %T') rank $rank: ${shown[*]}"

status=0
(
    echo "$BASHPID" >"$notes/pid_$rank"
    exec "${command[@]}"
) || status=$?
rm -f "$notes/pid_$rank"
if ((status != 0)); then
    # A mistake in the flags ends all ranks alike, and rank 0 tells of it: it must not be stopped before it has.
    if ((status == 2 && rank > 0)); then
        sleep 5
    fi
    if ((status == 2)); then
        echo 2 >"$FINAL_NOTE"
    fi
    # torchrun ends the ranks of an elastic run to start them with other nodes.
    if ((status == 143)) && [[ -n ${ELASTIC_PROCESSES:-} ]]; then
        exit "$status"
    fi
    # The first to fail is the one to look at; the others fail because it is gone.
    (set -o noclobber && echo "$rank $status" >"$notes/failure_${TORCHELASTIC_RESTART_COUNT:-0}") 2>/dev/null || true
fi
exit "$status"
