#!/usr/bin/env bash
# Sends what trainings without a connection have recorded for W&B; for a machine that has one, such as the login node:
#
#   slurm/sync_wandb.sh [OPTION OF wandb sync...] [OUTPUT_DIR ...]        (without folders: all of runs/)
#
# What was sent before is left out, and the parts of a training that was interrupted become one run. A training that is
# still running can be sent up to now; but then not its rest: so those that have written in the last minutes are left out.
set -u
: "${VENV_BIN:=.venv/bin}"       # the folder of wandb
MINUTES=3

options=() folders=()
for word in "$@"; do
  if [[ $word == -* ]]; then options+=("$word"); else folders+=("$word"); fi
done
((${#folders[@]})) || folders=(runs)

found=()
for folder in "${folders[@]}"; do
  while IFS= read -r -d '' file; do
    if [[ -n $(find "$(dirname "$file")" -maxdepth 1 -name '*.wandb' -mmin "-$MINUTES") ]]; then
      echo "left out, as it may still be running: $(dirname "$file")"
    else
      found+=("$(dirname "$file")")
    fi
  done < <(find -L "$folder" -path '*/wandb/offline-run-*/run-*.wandb' -print0 | sort -z)
done
if ((${#found[@]} == 0)); then
  echo "nothing to send in ${folders[*]}"
  exit 0
fi
exec "$VENV_BIN/wandb" sync --yes "${options[@]}" "${found[@]}"
