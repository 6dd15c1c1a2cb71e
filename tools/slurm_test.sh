#!/usr/bin/env bash
# Evaluate through Slurm.
# Environment: GPUS GPUS_PER_NODE CPUS_PER_TASK SRUN_ARGS.
set -euo pipefail

if [[ $# -lt 4 ]]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG CHECKPOINT" \
        "[options of test.py]" >&2
    exit 2
fi
TOOLS=$(cd "$(dirname "$0")" && pwd)
source "$TOOLS/support/srun.sh"

srun_script "$1" "$2" "$TOOLS/test.py" "$3" "$4" "${@:5}"
