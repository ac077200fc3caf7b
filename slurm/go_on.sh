# Sourced by the scripts beside it: runs a step of a job, and decides what becomes of the job when the step has ended.
#
# A training that was asked to stop saves, leaves a file PREEMPTED in its OUTPUT_DIR and ends with 85, of which torchrun
# makes 1; so it is the file that counts. The same command again goes on. Signals to this shell: USR1 saves and requeues
# (sent by Slurm before the time limit, or by: scancel --signal=USR1 --batch JOB).
#
# Exit codes of the job: 0 done, 85 stopped and not started again, 2 wrong settings, others: of the step that failed.

STOPPED=85
MAX_STARTS_WITHOUT_PROGRESS=2

# From the first moment on: SIGUSR1 would end this shell, and the job with it.
warned=
trap 'warned=1' USR1

# How this job is called: in an array SLURM_JOB_ID of one task is that of the whole array.
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
  JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
else
  JOB=$SLURM_JOB_ID
fi
START=${SLURM_RESTART_COUNT:-0}

say() { echo "$(date '+%F %T') job $JOB, start $((START + 1)): $*"; }

# run_step STEP ARGUMENT...: to its end; the step is a function that becomes srun (by exec). Sets code, and warned where
# Slurm has sent SIGUSR1, which ask_to_save has passed on.
run_step() {
  if [[ -n $warned ]]; then
    code=$STOPPED
    return
  fi
  trap 'warned=1; say "SIGUSR1: asks the ranks to save"; ask_to_save' USR1
  "$@" &
  child=$!
  wait "$child"
  code=$?
  while kill -0 "$child" 2> /dev/null; do # a signal with a trap ends wait, but not what it waited for
    wait "$child"
    code=$?
  done
  trap '' USR1
}

ask_to_save() { kill -USR1 "$child"; }

# find_environment: sets VENV_BIN where the user has not.
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
    echo "error: VENV_BIN must be the folder of python and torchrun, got $VENV_BIN; run uv sync, or set VENV_BIN" >&2
    exit 2
  fi
}

# run_until_done STEP NODES RANKS_PER_NODE ARGUMENT...: a training; the arguments are the program's. Sets NODES, of which
# the step takes no more: those that can share a batch.
run_until_done() {
  local step=$1 plan
  find_environment
  plan=$("$VENV_BIN/python" launch/plan.py --nodes "$2" --ranks_per_node "$3" "${@:4}") || exit
  { read -r NODES; IFS= read -r run_dir; } <<< "$plan"
  mkdir -p "$run_dir" || exit 1
  before=$(checkpoints)
  count_starts_without_progress
  rm -f "$run_dir/PREEMPTED"
  say "$SLURM_JOB_NUM_NODES node(s) $SLURM_JOB_NODELIST, OUTPUT_DIR $run_dir, ${before:-no checkpoint yet}"
  run_step "$step" "${@:4}"
  decide
}

# The names of the newest checkpoints.
checkpoints() {
  local files=()
  shopt -s nullglob
  files=("$run_dir"/checkpoints/last_*.pt)
  shopt -u nullglob
  echo "${files[*]##*/}"
}

# Slurm itself starts a job again whose node was lost; so this counts at each start, too.
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

# For good.
end_with() {
  rm -f "$starts"
  exit "$1"
}

give_up() {
  say "$MAX_STARTS_WITHOUT_PROGRESS starts in a row have ended without a new checkpoint, so this job ends; see why above"
  end_with 1
}

decide() {
  local after
  after=$(checkpoints)
  if ((code == 0)); then
    if compgen -G "$run_dir/wandb/offline-run-*" > /dev/null; then
      say "recorded for W&B without a connection; to send it, on a machine that has one: slurm/sync_wandb.sh $run_dir"
    fi
    say "done"
    end_with 0
  fi
  say "the step has ended with $code"
  end_if_not_ours
  if [[ -z $warned && ! -e $run_dir/PREEMPTED && $after == "$before" ]] && ! is_being_preempted; then
    say "failed without a new checkpoint; not started again"
    end_with "$code"
  fi
  if [[ $after == "$before" ]] && ((num_idle + 1 >= MAX_STARTS_WITHOUT_PROGRESS)); then
    give_up
  fi
  say "to be started again, from ${after:-the beginning}"
  requeue
}

# end_or_begin_anew: for a job that has nothing to go on from. Preempted, it begins anew; else it ends as its step.
end_or_begin_anew() {
  if [[ -z $warned ]] && ! is_being_preempted; then
    exit "$code"
  fi
  say "the step has ended with $code; to be started again"
  end_if_not_ours
  requeue
}

requeue() {
  scontrol requeue "$JOB" && sleep 600 # which Slurm ends
  say "cannot be requeued; submit it again to go on"
  exit "$STOPPED"
}

# job_field NAME: what Slurm knows of this job; asks for ten minutes where Slurm does not answer.
job_field() {
  local try known
  for ((try = 0; try < 60; try++)); do
    known=$(scontrol --oneliner show job "$JOB") && break
    sleep 10
  done
  tr ' ' '\n' <<< "$known" | sed -n "s/^$1=//p" | head -n 1
}

# A job that was cancelled stays away; and one whose node was cut off may have been started again elsewhere.
end_if_not_ours() {
  if [[ $(job_field JobState) != RUNNING || $(job_field Restarts) != "$START" ]]; then
    say "cancelled, or started again elsewhere; this start ends"
    exit "$STOPPED"
  fi
}

# By SIGTERM to the step alone, as where the site does not warn the batch script; it may have come before the training
# listened. (Times sort as text.)
is_being_preempted() {
  local time
  time=$(job_field PreemptTime)
  [[ $time == [0-9]* && ! $time < $(job_field StartTime) ]]
}
