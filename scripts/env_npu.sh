#!/usr/bin/env bash
# The environment of Ascend NPUs: CANN, its communication library HCCL, its logs. The launch scripts source it where
# there is an NPU; to have it in a shell of your own:
#   source scripts/env_npu.sh
# A variable that is set already keeps its value: HCCL_CONNECT_TIMEOUT=3600 bash scripts/train_full_8p.sh ...
# Three that say what cannot be found here:
#   CANN_SET_ENV=/path/to/set_env.sh   CANN in an unusual place
#   NETWORK_INTERFACE=enp189s0f0       the interface by which the nodes reach each other
#   MASTER_ADDR=10.0.0.1               the first node, of several
# It can be sourced under any shell options, and where there is no CANN: one line says so then.

# Prints the path of CANN's set_env.sh, nothing if there is none.
env_npu_find_cann() {
    local record line root
    local roots=("${HOME:-}/Ascend" ${CONDA_PREFIX:+"$CONDA_PREFIX/Ascend"} /usr/local/Ascend /opt/Ascend)
    # Installers write down where they put CANN: root's and the user's own.
    for record in /etc/Ascend/ascend_cann_install.info "${HOME:-}/Ascend/ascend_cann_install.info"; do
        if [[ -r $record ]]; then
            while IFS= read -r line || [[ -n $line ]]; do
                if [[ $line == *Install_Path*=* ]]; then
                    roots=("${line#*=}" "${roots[@]}")
                fi
            done <"$record"
        fi
    done
    # cann: from 8.5 on; ascend-toolkit: before; nnae: what runs networks, without the tools.
    for root in "${roots[@]}"; do
        for line in "$root"/{cann,ascend-toolkit,ascend-toolkit/latest,nnae}/set_env.sh; do
            if [[ -f $line ]]; then
                echo "$line"
                return
            fi
        done
    done
}

# CANN's script reads variables that are not set, and commands in it may fail: neither may end the caller's shell.
env_npu_source() {
    local env_npu_options=$- env_npu_file=$1
    shift
    set +eu
    # shellcheck disable=SC1090
    source "$env_npu_file"
    [[ $env_npu_options != *e* ]] || set -e
    [[ $env_npu_options != *u* ]] || set -u
}

# Prints this node's address on the interface that is named, or that leads to the first node, or to the outside.
env_npu_address() {
    local interface=${NETWORK_INTERFACE:-} master=${MASTER_ADDR:-} route
    command -v ip >/dev/null || return 0
    if [[ -z $interface && -n $master ]]; then
        master=$(getent ahostsv4 "$master" | awk 'NR == 1 {print $1}') || return 0
        route=$(ip -4 route get "$master" 2>/dev/null) || return 0
        if [[ $route =~ src\ ([0-9.]+) ]]; then
            echo "${BASH_REMATCH[1]}"
        fi
        return
    fi
    if [[ -z $interface ]]; then
        route=$(ip -4 route show default 2>/dev/null) || return 0
        [[ $route =~ dev\ ([^ ]+) ]] || return 0
        interface=${BASH_REMATCH[1]}
    fi
    route=$(ip -4 -o address show dev "$interface" 2>/dev/null) || return 0
    if [[ $route =~ inet\ ([0-9.]+) ]]; then
        echo "${BASH_REMATCH[1]}"
    fi
}

# CANN's own variables: where libraries, operators and tools are. ASCEND_HOME_PATH or ASCEND_TOOLKIT_HOME is set where
# that has been done before, in the shell's profile or in a container's image.
if [[ -n ${CANN_SET_ENV:-} || -z ${ASCEND_HOME_PATH:-}${ASCEND_TOOLKIT_HOME:-} ]]; then
    env_npu_found=${CANN_SET_ENV:-$(env_npu_find_cann)}
    if [[ -f $env_npu_found ]]; then
        env_npu_source "$env_npu_found"
    else
        echo "env_npu.sh: CANN is not found${env_npu_found:+: $env_npu_found}; install it, or name it:" \
            "CANN_SET_ENV=/path/to/set_env.sh" >&2
    fi
fi
# The driver's libraries, which CANN's script leaves to the system: containers often do not know them.
for env_npu_found in /usr/local/Ascend/driver/lib64{,/common,/driver}; do
    if [[ -d $env_npu_found && ":${LD_LIBRARY_PATH:-}:" != *":$env_npu_found:"* ]]; then
        export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$env_npu_found"
    fi
done

# HCCL, collective communication. No list of hosts that may take part has to be kept (1), as it must with 0.
export HCCL_WHITELIST_DISABLE="${HCCL_WHITELIST_DISABLE:-1}"
# Seconds that ranks wait for each other to connect, 120 to 7200. HCCL's own 120 are too few when one of them
# tokenizes or compiles operators first.
export HCCL_CONNECT_TIMEOUT="${HCCL_CONNECT_TIMEOUT:-1200}"
# The address that HCCL starts from. By itself it takes the first interface in alphabetical order, which need not be
# the one that the other nodes can reach. HCCL_SOCKET_IFNAME, if given, chooses in HCCL's own way.
if [[ -z ${HCCL_IF_IP:-}${HCCL_SOCKET_IFNAME:-} ]]; then
    env_npu_found=$(env_npu_address || true)
    if [[ -n $env_npu_found ]]; then
        export HCCL_IF_IP="$env_npu_found"
    fi
fi

# How operators are launched. 0: one after another. 1: a second thread launches them while Python goes on. 2 has that
# thread prepare their workspaces too; torch_npu 2.13 says that it is for inference only, and it needs more memory.
export TASK_QUEUE_ENABLE="${TASK_QUEUE_ENABLE:-1}"
# 1: an overflow in float16 gives inf, by which the loss scale sees it; 0: the largest float16 number.
export INF_NAN_MODE_ENABLE="${INF_NAN_MODE_ENABLE:-1}"
# 1: a pair of operators that only rearranges a tensor becomes one.
export COMBINED_ENABLE="${COMBINED_ENABLE:-1}"

# Logs of the runtime. From which level on: 0 debug, 1 info, 2 warning, 3 error.
export ASCEND_GLOBAL_LOG_LEVEL="${ASCEND_GLOBAL_LOG_LEVEL:-3}"
# 1: event logs too.
export ASCEND_GLOBAL_EVENT_ENABLE="${ASCEND_GLOBAL_EVENT_ENABLE:-0}"
# 0: into files under ~/ascend/log. 1: to the terminal, between the lines of the training.
export ASCEND_SLOG_PRINT_TO_STDOUT="${ASCEND_SLOG_PRINT_TO_STDOUT:-0}"

unset -f env_npu_find_cann env_npu_source env_npu_address
unset env_npu_found
