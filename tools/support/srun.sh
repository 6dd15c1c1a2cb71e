# shellcheck shell=bash
# Sourced by slurm_train.sh and slurm_test.sh.

# srun_script PARTITION JOB_NAME SCRIPT [arguments]
srun_script() {
    local partition=$1 job_name=$2 script=$3
    local gpus=${GPUS:-8} per_node=${GPUS_PER_NODE:-8}
    local root extra=()
    root=$(dirname "$(dirname "$script")")
    # Fewer GPUs than one node has: do not ask for more tasks than there are.
    if ((gpus < per_node)); then
        per_node=$gpus
    fi
    read -r -a extra <<<"${SRUN_ARGS:-}"
    if ! command -v srun >/dev/null; then
        echo "error: srun is not in PATH; without Slurm use dist_train.sh or" \
            "dist_test.sh." >&2
        exit 1
    fi
    PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" \
        exec srun --partition "$partition" --job-name "$job_name" \
        --gres "gpu:$per_node" --ntasks "$gpus" \
        --ntasks-per-node "$per_node" \
        --cpus-per-task "${CPUS_PER_TASK:-5}" \
        --kill-on-bad-exit=1 ${extra[@]+"${extra[@]}"} \
        python -u "$script" "${@:4}" --launcher slurm
}
