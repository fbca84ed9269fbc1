#!/usr/bin/env bash
# Starts a training on any number of cards, and ends it: train_full_1p.sh and its three sisters call it.
#   scripts/launch.sh full|performance CARDS clm|mlm|plm [options] [flags of run_clm.py, run_mlm.py or run_plm.py]
#
# Options, as "--name value" or "--name=value", anywhere among the flags:
#   --data_path FOLDER     the text: files with "train" and "valid" in their names, or a folder saved by `datasets`
#   --nproc N              cards (or processes on a CPU) of this node
#   --nnodes N             nodes; run the same command on each of them, with its own --node_rank
#   --nnodes MIN:MAX       elastic: goes on with fewer nodes when some are lost, and with more when they come back; the
#                          samples of a step stay those of MAX nodes
#   --node_rank N          this node's number, from 0; node 0 keeps the list of nodes
#   --master_addr ADDRESS  node 0's address; also from the variable MASTER_ADDR
#   --master_port PORT     a free port of node 0; default 29500
#   --bind_cores yes|no    give each rank cores of its own; default: yes on aarch64
#   --max_restarts N       start all ranks again, up to N times, when one has died or hangs: they go on from the newest
#                          checkpoint; not after a mistake in the flags, nor after a stop on request; default 0. A node
#                          that was lost is waited for: run its command again
#   --rdzv_conf K=V,...    torchrun's rendezvous, with --max_restarts or MIN:MAX: join_timeout (600 seconds that nodes wait
#                          for each other), last_call_timeout (30 that MIN nodes wait for more)
#   --env_npu yes|no       source scripts/env_npu.sh; default: yes where there is an NPU
#   --help                 this text
#
# All other flags go to the script unchanged, and win over the defaults: 3 epochs with evaluation (full), 200 steps
# without (performance), O2 in float16 where the device is built for it, combined gradients, and the output folder
# output/<objective>_<full|performance>_<cards>p. Each rank's log is train_<rank>.log there.
# PYTHON=/path/to/python chooses the interpreter. Without it: that of an activated environment, .venv's, or python3.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/environment.sh
source "$root/scripts/environment.sh"

usage() {
    sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
}

fail() {
    echo "launch.sh: error: $1" >&2
    exit 2
}

# ---- what is asked for ----
mode=${1:-} nproc=${2:-}
shift $(($# < 2 ? $# : 2))
objective='' data_path='' nnodes=1 node_rank=0 master_addr=${MASTER_ADDR:-} master_port=''
max_restarts=0 rdzv_conf=''
bind_cores=$([[ $(uname -m) == aarch64 ]] && echo yes || echo no)
env_npu=$npu_is_here
options=' data_path nproc nnodes node_rank master_addr master_port bind_cores max_restarts rdzv_conf env_npu '
flags=()
while (($#)); do
    name=${1%%=*}
    name=${name#--}
    name=${name//-/_}
    if [[ $1 == --help || $1 == -h ]]; then
        usage
        exit
    elif [[ $1 == --*=* && $options == *" $name "* ]]; then
        printf -v "$name" %s "${1#*=}"
    elif [[ $1 == --* && $options == *" $name "* ]]; then
        (($# > 1)) || fail "$1: its value is missing"
        printf -v "$name" %s "$2"
        shift
    elif [[ -z $objective && ${#flags[@]} == 0 && $1 =~ ^[cmp]lm$ ]]; then
        objective=$1
    else
        flags+=("$1")
    fi
    shift
done
[[ $mode == full || $mode == performance ]] || fail "'$mode': the first word is full or performance; --help tells more"
[[ -n $objective ]] || fail "say what to train: clm (GPT-2, GPT), mlm (BERT, RoBERTa, ...) or plm (XLNet)"
min_nodes=${nnodes%%:*} max_nodes=${nnodes##*:}
[[ $nproc =~ ^[1-9][0-9]*$ ]] || fail "--nproc $nproc: give a whole number of 1 or more"
if ! [[ $nnodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || ((min_nodes > max_nodes)); then
    fail "--nnodes $nnodes: give a whole number of 1 or more, or MIN:MAX"
fi
if ! [[ $node_rank =~ ^(0|[1-9][0-9]*)$ ]] || ((node_rank >= max_nodes)); then
    fail "--node_rank $node_rank: give a number from 0 to $((max_nodes - 1)), --nnodes less 1"
fi
[[ $max_restarts =~ ^(0|[1-9][0-9]*)$ ]] || fail "--max_restarts $max_restarts: give a whole number of 0 or more"
[[ -z $master_port || $master_port =~ ^[1-9][0-9]*$ ]] || fail "--master_port $master_port: give a number"
((max_nodes == 1)) || [[ -n $master_addr ]] || fail "--nnodes $nnodes: add --master_addr, the address of node 0"
for name in bind_cores env_npu; do
    [[ ${!name} == yes || ${!name} == no ]] || fail "--$name ${!name}: give yes or no"
done
world_size=$((nproc * max_nodes))
is_elastic=no rejoins=no
if ((min_nodes < max_nodes)); then
    is_elastic=yes
fi
# Nodes find each other again and again, in a list that node 0 keeps. Otherwise they are numbered once.
if ((max_nodes > 1)) && [[ $is_elastic == yes || $max_restarts != 0 ]]; then
    rejoins=yes
fi

# ---- the environment ----
# What another launcher has left in the environment would contradict this one.
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE
if ((max_nodes > 1)); then
    export MASTER_ADDR=$master_addr
fi
if [[ $is_elastic == yes ]]; then
    export ELASTIC_PROCESSES=$world_size
fi
if [[ $env_npu == yes ]]; then
    # shellcheck source=scripts/env_npu.sh
    source "$root/scripts/env_npu.sh"
fi
if [[ -z ${OMP_NUM_THREADS:-} ]] && ((nproc > 1)); then
    cores=$(nproc)
    export OMP_NUM_THREADS=$((cores > nproc ? cores / nproc : 1))
fi
export PYTHONUNBUFFERED=1 # logs are read while they are written
ours() {
    PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" "$python" -P -m "$@"
}
if ((max_nodes > 1)); then
    found=$(ours utils.node_address "$master_addr") || exit 2
    read -r address interface <<<"$found"
    # gloo takes the address that the host's own name stands for, which may be 127.0.0.1.
    if [[ -n $interface ]]; then
        export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
    fi
fi

# ---- the command ----
notes=$(mktemp -d)
trap 'rm -rf "$notes"' EXIT
ours utils.launch --plan "$notes/plan" \
    --mode "$mode" --objective "$objective" --nproc "$nproc" --world_size "$world_size" --nnodes "$nnodes" \
    --data_path "$data_path" --npu_is_here "$npu_is_here" -- ${flags[@]+"${flags[@]}"}
words=() # quoted by the plan for this shell
eval "words=($(<"$notes/plan"))"
output=${words[0]}
ranks=(bash "$root/scripts/run_rank.sh" "$output" "$notes" "$bind_cores"
    "$python" "$root/run_$objective.py" "${words[@]:1}")
mkdir -p "$output"
torchrun=("$python" -m torch.distributed.run --nproc_per_node="$nproc")
if [[ $rejoins == yes ]]; then
    # A node that comes back would meet the others' old addresses in a store that they share: each start has its own.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    is_host=false
    if ((node_rank == 0)); then
        is_host=true
    fi
    torchrun+=(--nnodes="$nnodes" --rdzv_backend=c10d --rdzv_endpoint="$master_addr:${master_port:-29500}"
        --rdzv_id="${output//[^a-zA-Z0-9]/_}" --rdzv_conf="is_host=$is_host${rdzv_conf:+,$rdzv_conf}"
        --local_addr="$address")
elif ((max_nodes == 1)) && [[ -z $master_port ]]; then
    torchrun+=(--standalone)
else
    torchrun+=(--nnodes="$nnodes" --node_rank="$node_rank" --master_addr="${master_addr:-127.0.0.1}"
        --master_port="${master_port:-29500}")
fi
# Where torchrun itself is told to end, by a scheduler say, it kills ranks that are still saving after 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

# ---- the training ----
if [[ $rejoins == no ]]; then
    for ((rank = node_rank * nproc; rank < (node_rank + 1) * nproc; rank++)); do
        touch "$output/train_$rank.log" # an earlier start's lines stay
    done
fi
start=$(date +%s)
echo "logs: $output/train_<rank>.log"
export LAUNCH_RESTARTS=0 # by this script, beside torchrun's own
# In a session of its own, so that a terminal's signals reach it through this script alone.
start_training() {
    local command=("${torchrun[@]}" --max_restarts="$((max_restarts - LAUNCH_RESTARTS))" --no_python "${ranks[@]}")
    if ((world_size == 1 && max_restarts == 0)); then
        command=("${ranks[@]}")
    fi
    rm -f "$notes"/failure_* "$notes/began"
    setsid "${command[@]}" >"$notes/launcher.log" 2>&1 &
    training=$!
    echo "$training" >"$notes/launcher"
}
# Shows the log of this node's first rank, whose number may be another after each start.
show_log() {
    local rank size now told tail=''
    while :; do
        if [[ -s $notes/shown ]]; then
            read -r now size <"$notes/shown"
            if [[ $now != "${rank:-}" ]]; then
                [[ -z $tail ]] || kill "$tail" 2>/dev/null || true
                rank=$now
                tail -c "+$((size + 1))" -f -s 0.2 --pid="$$" "$output/train_$rank.log" &
                tail=$!
            fi
        fi
        if [[ -e $notes/over ]]; then
            break
        fi
        # What has ended for good torchrun would start again, after it has waited for more nodes.
        if [[ $rejoins == yes && -s $notes/final && -z ${told:-} ]] && ! compgen -G "$notes/pid_*" >/dev/null; then
            told=yes
            kill -TERM "$(<"$notes/launcher")" 2>/dev/null || true
        fi
        sleep 0.2
    done
    sleep 0.4
    [[ -z $tail ]] || kill "$tail" 2>/dev/null || true
}
# Whether torchrun ended because the list of nodes was lost, with node 0 or the way to it, and starts are left.
lost_the_others() {
    local used=0 failure
    [[ $rejoins == yes && -z $caught && ! -s $notes/final ]] || return 1
    for failure in "$notes"/failure_*; do
        [[ ! -e $failure ]] || used=$((used + 1))
    done
    if [[ ! -e $notes/began ]]; then # nobody answered yet
        ((SECONDS < patience))
        return
    fi
    used=$((used > 0 ? used : 1))
    ((used <= max_restarts - LAUNCH_RESTARTS)) || return 1
    LAUNCH_RESTARTS=$((LAUNCH_RESTARTS + used))
    patience=$((SECONDS + 600))
}
patience=600 # seconds that node 0 is waited for
caught=''
# Hands a signal to the ranks of this node, who hand it on to all others, save and end. torchrun is left alone: told to
# end, it would count the seconds. It is told where no rank has begun.
hand_on() {
    local pids
    if [[ $1 != USR1 ]]; then
        echo $((128 + $(kill -l "$1"))) >"$notes/final"
    fi
    pids=$(cat "$notes"/pid_* 2>/dev/null) || true
    if [[ -n $pids ]]; then
        # shellcheck disable=SC2086
        kill -s "$1" $pids 2>/dev/null || true
        if [[ $1 == INT ]]; then # which a rank that does not listen yet ignores; to one that does, both are one request
            sleep 0.3
            # shellcheck disable=SC2086
            kill -TERM $pids 2>/dev/null || true
        fi
    elif [[ $1 != USR1 ]]; then
        kill -TERM -- "-$training" 2>/dev/null || true
    fi
}
trap 'caught=INT; hand_on INT' INT
trap 'caught=TERM; hand_on TERM' TERM
trap 'caught=HUP; hand_on TERM' HUP
trap 'hand_on USR1' USR1
show_log &
tail=$!
status=0
while :; do
    start_training
    # A signal ends wait before its time.
    while :; do
        wait "$training" && status=0 || status=$?
        kill -0 "$training" 2>/dev/null || break
    done
    if ((status == 0)) || ! lost_the_others; then
        break
    fi
    echo "launch.sh: the list of nodes is lost, which node 0 keeps; this node waits for it" >&2
done
touch "$notes/over"
wait "$tail" || true

# ---- the results ----
# A rank may have been told to end, and not this script.
if [[ -z $caught && -s $notes/final ]]; then
    case $(<"$notes/final") in
        130) caught=INT ;;
        143) caught=TERM ;;
    esac
fi
if [[ -n $caught ]]; then
    echo "launch.sh: ended by SIG$caught; the same command goes on from its newest checkpoint, if there is one" >&2
    exit $((128 + $(kill -l "$caught")))
fi
if ((status != 0)); then
    failure=$(find "$notes" -name 'failure_*' | sort -V | tail -n 1)
    if [[ -n $failure ]]; then
        read -r rank status <"$failure"
        how="ended with exit code $status"
        if ((status > 128)); then
            how="was ended by signal $((status - 128))"
        fi
        log=$output/train_$rank.log
        echo "launch.sh: rank $rank $how, and so all ranks were ended. Its log, $log, closes with:" >&2
        tail -n 20 "$log" | sed 's/^/    /' >&2
    else
        echo "launch.sh: no rank ended by itself; torchrun says:" >&2
        tail -n 30 "$notes/launcher.log" | sed 's/^/    /' >&2
    fi
    exit "$status"
fi
read -r rank _ <"$notes/shown"
if ((rank > 0)); then
    echo "the results are on node 0"
    exit
fi
"$python" "$root/scripts/show_results.py" "$output" "$start"
