# Sourced by the sbatch scripts. Runs the step of a job and decides what happens to the job when the step ends.
#
# A training that is asked to stop saves, writes the file PREEMPTED into its OUTPUT_DIR and ends with exit code 85.
# torchrun turns that code into 1, so the file decides. The same command resumes the training. SIGUSR1 to this shell
# saves and requeues (sent by Slurm before the time limit, or by: scancel --signal=USR1 --batch JOB).
#
# Exit codes of the job: 0 done, 85 stopped and not requeued, 2 invalid settings, others: exit code of the failed step.

STOPPED=85
MAX_STARTS_WITHOUT_PROGRESS=2

# Set at once: without a trap, SIGUSR1 ends this shell and with it the job.
warned=
trap 'warned=1' USR1

# Name of this job. In an array, one task's SLURM_JOB_ID is that of the whole array.
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
  JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
else
  JOB=$SLURM_JOB_ID
fi
START=${SLURM_RESTART_COUNT:-0}

log() { echo "$(date '+%F %T') job $JOB, start $((START + 1)): $*"; }

# run_step STEP ARGUMENT...: run the step, a function that becomes srun by exec, to its end. Sets code, and warned if
# Slurm has sent SIGUSR1, which ask_to_save passes on.
run_step() {
  if [[ -n $warned ]]; then
    code=$STOPPED
    return
  fi
  trap 'warned=1; log "SIGUSR1: asking the ranks to save"; ask_to_save' USR1
  "$@" &
  child=$!
  wait "$child"
  code=$?
  while kill -0 "$child" 2> /dev/null; do # a trapped signal ends wait, but not the child
    wait "$child"
    code=$?
  done
  trap '' USR1
}

ask_to_save() { kill -USR1 "$child"; }

# find_environment: set VENV_BIN unless the user has.
find_environment() {
  local folder
  prepare >&2 || exit
  if [[ -z $VENV_BIN ]]; then
    VENV_BIN=.venv/bin
    for folder in "${VIRTUAL_ENV:-.venv}/bin" .venv/bin "${CONDA_PREFIX:-.venv}/bin"; do
      if [[ -x $folder/torchrun ]]; then
        VENV_BIN=$folder
        break
      fi
    done
  fi
  if [[ ! -x $VENV_BIN/python ]]; then
    echo "error: VENV_BIN must be the folder of python and torchrun, got $VENV_BIN. Fix: uv sync, or set VENV_BIN." >&2
    exit 2
  fi
}

# run_until_done STEP NODES RANKS_PER_NODE ARGUMENT...: run a training; the arguments are those of the program. Sets
# NODES to the number of nodes that can share a batch; the step uses no more.
run_until_done() {
  local step=$1 plan
  find_environment
  plan=$("$VENV_BIN/python" launch/plan.py --nodes "$2" --ranks_per_node "$3" "${@:4}") || exit
  { read -r NODES; IFS= read -r run_dir; } <<< "$plan"
  mkdir -p "$run_dir" || exit 1
  before=$(checkpoints)
  count_starts_without_progress
  rm -f "$run_dir/PREEMPTED"
  log "$SLURM_JOB_NUM_NODES node(s) $SLURM_JOB_NODELIST, OUTPUT_DIR $run_dir, ${before:-no checkpoint yet}"
  run_step "$step" "${@:4}"
  decide
}

# Print the names of the newest checkpoints.
checkpoints() {
  local files=()
  shopt -s nullglob
  files=("$run_dir"/checkpoints/last_*.pt)
  shopt -u nullglob
  echo "${files[*]##*/}"
}

# Counted at each start, because Slurm itself requeues a job that has lost a node.
count_starts_without_progress() {
  local known=
  starts=$run_dir/.starts_of_job_$JOB
  num_idle=0
  if [[ -r $starts && $START -gt 0 ]]; then
    { read -r num_idle; read -r known; } < "$starts"
    if [[ $known == "$before" ]]; then
      num_idle=$((num_idle + 1))
    else
      num_idle=0
    fi
  fi
  printf '%s\n%s\n' "$num_idle" "$before" > "$starts"
  if ((num_idle >= MAX_STARTS_WITHOUT_PROGRESS)); then
    give_up
  fi
}

# end_with CODE: end the job; it will not start again.
end_with() {
  rm -f "$starts"
  exit "$1"
}

give_up() {
  log "$MAX_STARTS_WITHOUT_PROGRESS starts in a row ended without a new checkpoint; not requeued, see the errors above"
  end_with 1
}

decide() {
  local after
  after=$(checkpoints)
  if ((code == 0)); then
    if compgen -G "$run_dir/wandb/offline-run-*" > /dev/null; then
      log "the W&B run was recorded offline; to send it, run on a machine with a network: slurm/sync_wandb.sh $run_dir"
    fi
    log "done"
    end_with 0
  fi
  log "the step ended with exit code $code"
  end_if_not_current
  if [[ -z $warned && ! -e $run_dir/PREEMPTED && $after == "$before" ]] && ! is_being_preempted; then
    log "failed without a new checkpoint; not requeued"
    end_with "$code"
  fi
  if [[ $after == "$before" ]] && ((num_idle + 1 >= MAX_STARTS_WITHOUT_PROGRESS)); then
    give_up
  fi
  log "requeueing; the next start resumes from ${after:-the beginning}"
  requeue
}

# end_or_restart: end a job that has nothing to resume from with the code of its step, or start it again if preempted.
end_or_restart() {
  if [[ -z $warned ]] && ! is_being_preempted; then
    exit "$code"
  fi
  log "the step ended with exit code $code; requeueing"
  end_if_not_current
  requeue
}

requeue() {
  scontrol requeue "$JOB" && sleep 600 # until Slurm ends this shell
  log "the job cannot be requeued. Fix: submit it again to resume."
  exit "$STOPPED"
}

# job_field NAME: print a field of Slurm's record of this job. Retries for ten minutes if Slurm does not answer.
job_field() {
  local try known
  for ((try = 0; try < 60; try++)); do
    known=$(scontrol --oneliner show job "$JOB") && break
    sleep 10
  done
  tr ' ' '\n' <<< "$known" | sed -n "s/^$1=//p" | head -n 1
}

# A cancelled job must not be requeued, nor one that Slurm restarted elsewhere while its node was disconnected.
end_if_not_current() {
  if [[ $(job_field JobState) != RUNNING || $(job_field Restarts) != "$START" ]]; then
    log "the job was cancelled or restarted elsewhere; this start ends"
    exit "$STOPPED"
  fi
}

# Where the site does not warn the batch script, only the step gets SIGTERM, perhaps before the training handles it. So
# ask Slurm. (Times sort as text.)
is_being_preempted() {
  local time
  time=$(job_field PreemptTime)
  [[ $time == [0-9]* && ! $time < $(job_field StartTime) ]]
}
