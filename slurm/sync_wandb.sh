#!/usr/bin/env bash
# Sends what trainings without a connection have recorded for W&B; for a machine that has one, such as the login node:
#
#   slurm/sync_wandb.sh [OPTION OF wandb sync...] [OUTPUT_DIR ...]        (without folders: all of runs/)
#
# What was sent before is left out, and the parts of a training that was interrupted, or whose server went away, become
# one run. A training that is still running can be sent up to now; but then not its rest: so those that have written in
# the last minutes are left out. Ends with 1 where W&B has not taken all; then the same again goes on.
set -u
: "${VENV_BIN:=.venv/bin}"       # the folder of wandb and python
MINUTES=3

options=() folders=()
for word in "$@"; do
  if [[ $word == -* ]]; then options+=("$word"); else folders+=("$word"); fi
done
((${#folders[@]})) || folders=(runs)

found=()
for folder in "${folders[@]}"; do
  while IFS= read -r -d '' file; do
    if [[ -e $file.synced ]]; then
      continue
    elif [[ -n $(find "$(dirname "$file")" -maxdepth 1 -name '*.wandb' -mmin "-$MINUTES") ]]; then
      echo "left out, as it may still be running: $(dirname "$file")"
    else
      found+=("$(dirname "$file")")
    fi
  done < <(find -L "$folder" \( -path '*/wandb/offline-run-*/run-*.wandb' -o -path '*/wandb/run-*/run-*.wandb' \) -print0 | sort -z)
done
if ((${#found[@]} == 0)); then
  echo "nothing to send in ${folders[*]}"
  exit 0
fi

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
pieces=()
for piece in "${found[@]}"; do pieces+=("$(realpath "$piece")"); done
WANDB_DIR=$logs "$VENV_BIN/wandb" sync --yes --include-online "${options[@]}" "${pieces[@]}"
code=$?

# It marks a part as sent, and ends with 0, even if W&B has not taken a checkpoint of it.
shopt -s nullglob
"$VENV_BIN/python" -m reid.handlers.wandb_pieces "$logs"/wandb/logs/debug-sync.*.log || code=1
exit "$code"
