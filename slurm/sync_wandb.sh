#!/usr/bin/env bash
# Send what trainings without a connection have recorded for W&B, from a machine that has one, such as the login node:
#
#   slurm/sync_wandb.sh [OPTION OF wandb sync...] [OUTPUT_DIR ...]        (without folders: all of runs/)
#
# Sent segments are skipped. The segments of a training that was interrupted, or whose server went away, become one run.
# A segment that was written to in the last minutes may be of a running training, whose later rows could not be sent any
# more: it is skipped too. The exit code is 1 if W&B has not taken all; the same command then sends the rest.
set -u
: "${VENV_BIN:=.venv/bin}"       # the folder of wandb and python
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
    echo "left out, as it may still be running: $segment"
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

# It marks a segment as sent, and ends with 0, even if W&B has not taken a checkpoint of it (see reid/tracking/offline.py).
while IFS= read -r file; do
  rm -f "$file.synced"
  echo "W&B has not taken all of $(dirname "$file")" >&2
  code=1
done < <(cat "$logs"/wandb/logs/debug-sync.*.log 2>/dev/null | grep -E '"ERROR\+4"|failed to log artifact|CreateRunFiles returned error' |
  sed -nE 's/.*"sync_path": ?"([^"]+)".*/\1/p' | sort -u)
exit "$code"
