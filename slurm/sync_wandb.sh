#!/usr/bin/env bash
# Send W&B runs that were recorded offline, from a machine with a network, such as the login node:
#
#   slurm/sync_wandb.sh [OPTION OF wandb sync...] [OUTPUT_DIR ...]        (default: runs)
#
# The segments of one training become one run; segments already sent are skipped. A segment written in the last minutes
# is skipped too: its training may still be running, and W&B would not accept its later rows. The exit code is 1 if W&B
# did not accept everything; the same command then sends the rest.
set -u
: "${VENV_BIN:=.venv/bin}"       # folder of wandb and python
MINUTES=3

options=() folders=() segments=()
for argument in "$@"; do
  if [[ $argument == -* ]]; then options+=("$argument"); else folders+=("$argument"); fi
done
((${#folders[@]})) || folders=(runs)

while IFS= read -r -d '' file; do
  segment=$(dirname "$file")
  if [[ -e $file.synced ]]; then
    continue
  elif [[ -n $(find "$segment" -maxdepth 1 -name '*.wandb' -mmin "-$MINUTES") ]]; then
    echo "skipped, as it may still be running: $segment"
  else
    segments+=("$(realpath "$segment")")
  fi
done < <(find -L "${folders[@]}" \( -path '*/wandb/offline-run-*/run-*.wandb' -o -path '*/wandb/run-*/run-*.wandb' \) -print0 | sort -z)
if ((${#segments[@]} == 0)); then
  echo "nothing to send in ${folders[*]}"
  exit 0
fi

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
WANDB_DIR=$logs "$VENV_BIN/wandb" sync --yes --include-online "${options[@]}" "${segments[@]}"
code=$?

# wandb sync marks a segment as sent and ends with 0 even if W&B did not accept one of its checkpoints
# (reid/tracking/offline.py).
while IFS= read -r file; do
  rm -f "$file.synced"
  echo "W&B did not accept all of $(dirname "$file")" >&2
  code=1
done < <(cat "$logs"/wandb/logs/debug-sync.*.log 2>/dev/null | grep -E '"ERROR\+4"|failed to log artifact|CreateRunFiles returned error' |
  sed -nE 's/.*"sync_path": ?"([^"]+)".*/\1/p' | sort -u)
exit "$code"
