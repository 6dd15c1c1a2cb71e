#!/usr/bin/env bash
# Evaluate on several GPUs, or in several CPU processes where there is no GPU.
# Environment: as for dist_train.sh.
set -euo pipefail

if [[ $# -lt 3 || ! $3 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 CONFIG CHECKPOINT GPUS [options of test.py]" >&2
    exit 2
fi
CONFIG=$1
CHECKPOINT=$2
GPUS=$3
TOOLS=$(cd "$(dirname "$0")" && pwd)
source "$TOOLS/support/torchrun.sh"

torchrun_script "$GPUS" "$TOOLS/test.py" "$CONFIG" "$CHECKPOINT" "${@:4}"
