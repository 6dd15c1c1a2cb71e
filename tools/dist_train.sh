#!/usr/bin/env bash
# Train on several GPUs, or in several CPU processes where there is no GPU.
# Environment: NNODES NODE_RANK MASTER_ADDR PORT (all but PORT as in OpenMMLab:
# without it, one node takes a free port and several nodes take 29500).
set -euo pipefail

if [[ $# -lt 2 || ! $2 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 CONFIG GPUS [options of train.py]" >&2
    exit 2
fi
CONFIG=$1
GPUS=$2
TOOLS=$(cd "$(dirname "$0")" && pwd)
source "$TOOLS/support/torchrun.sh"

torchrun_script "$GPUS" "$TOOLS/train.py" "$CONFIG" "${@:3}"
