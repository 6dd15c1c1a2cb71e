#!/usr/bin/env bash
# Train through Slurm.
# Environment: GPUS GPUS_PER_NODE CPUS_PER_TASK SRUN_ARGS.
set -euo pipefail

if [[ $# -lt 3 ]]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG [WORK_DIR]" \
        "[options of train.py]" >&2
    exit 2
fi
TOOLS=$(cd "$(dirname "$0")" && pwd)
source "$TOOLS/support/srun.sh"

# bash before 4.4 takes an empty array for an unset variable.
OPTIONS=("${@:4}")
if [[ $# -gt 3 && $4 != -* ]]; then
    OPTIONS=(--work-dir "${@:4}")
fi
srun_script "$1" "$2" "$TOOLS/train.py" "$3" \
    ${OPTIONS[@]+"${OPTIONS[@]}"}
