# shellcheck shell=bash
# Sourced by dist_train.sh and dist_test.sh.

# torchrun_script PROCESSES SCRIPT [arguments]
torchrun_script() {
    local processes=$1 script=$2
    local nnodes=${NNODES:-1} node_rank=${NODE_RANK:-0} port=${PORT:-}
    local address=${MASTER_ADDR:-127.0.0.1}
    local root
    root=$(dirname "$(dirname "$script")")
    if [[ -z $port && $nnodes == 1 ]]; then
        port=$(python -c 'import socket
s = socket.create_server(("127.0.0.1", 0))
print(s.getsockname()[1])')
    fi
    port=${port:-29500}
    # Only the first node listens, so only there can the port be taken.
    if [[ $node_rank == 0 ]] &&
        (exec 3<>"/dev/tcp/$address/$port") 2>/dev/null; then
        echo "error: PORT=$port is in use on $address, probably by another" \
            "run. Set PORT to a free one, the same on every node." >&2
        exit 1
    fi
    PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" \
        exec python -m torch.distributed.run \
        --nnodes "$nnodes" --node-rank "$node_rank" \
        --master-addr "$address" --master-port "$port" \
        --nproc-per-node "$processes" \
        "$script" "${@:3}" --launcher pytorch
}
