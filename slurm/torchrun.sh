# Sourced by the scripts beside it.

# become_torchrun PROGRAM ARGUMENT...: one torchrun on each of the job's first NODES nodes, in place of this shell.
become_torchrun() {
  local nodes
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n "$NODES")
  # Another port and another name at each start: what is left of the one before must not answer.
  RENDEZVOUS_ID=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
  RENDEZVOUS=${nodes[0]}:$((20000 + (SLURM_JOB_ID + 101 * ${SLURM_RESTART_COUNT:-0}) % 10000))
  export NODES RENDEZVOUS_ID RENDEZVOUS VENV_BIN RANKS_PER_NODE MAX_RESTARTS SAVE_SECONDS
  export -f prepare
  # Else ranks that are started again often find the addresses of those before them.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  # The script itself must not ask for --ntasks-per-node: of --nodes=1-4 Slurm would then give one.
  # Signals reach only torchrun, which passes them on. Once torchrun has ended on one node, it is ended on the others.
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
