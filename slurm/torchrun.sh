# Sourced by the sbatch scripts.

# become_torchrun PROGRAM ARGUMENT...: replace this shell by one torchrun on each of the first NODES nodes of the job.
become_torchrun() {
  local nodes
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n "$NODES")
  # The port and the id differ between starts, so that processes left from the previous start cannot join.
  RENDEZVOUS_ID=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
  RENDEZVOUS=${nodes[0]}:$((20000 + (SLURM_JOB_ID + 101 * ${SLURM_RESTART_COUNT:-0}) % 10000))
  export NODES RENDEZVOUS_ID RENDEZVOUS VENV_BIN RANKS_PER_NODE MAX_RESTARTS SAVE_SECONDS
  export -f prepare
  # Without this, restarted ranks often read the addresses of the previous attempt.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  # The job must not set --ntasks-per-node: with --nodes=1-4, Slurm would then allocate one node.
  # Signals reach only torchrun, which forwards them. When torchrun ends on one node, srun ends it on the others.
  # shellcheck disable=SC2016
  exec srun --nodes="$NODES" --nodelist="$(IFS=,; echo "${nodes[*]}")" --ntasks="$NODES" --ntasks-per-node=1 \
    --kill-on-bad-exit=0 --wait="$SAVE_SECONDS" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c '
    prepare || exit
    ranks=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    threads=$((${SLURM_CPUS_PER_TASK:-1} / ranks))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
    exec "$VENV_BIN/torchrun" --nnodes="$NODES" --nproc-per-node="$ranks" \
      --rdzv-backend=c10d --rdzv-id="$RENDEZVOUS_ID" --rdzv-endpoint="$RENDEZVOUS" --rdzv-conf=join_timeout=300 \
      --max-restarts="$MAX_RESTARTS" --shutdown-timeout="$SAVE_SECONDS" \
      --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "$@"' torchrun "$@"
}
