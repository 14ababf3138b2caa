#!/bin/bash
#SBATCH --job-name=raysweep
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --no-kill
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
# Runs a sweep on the nodes of a Slurm job: sbatch docs/cluster/slurm.sh CONFIG [key=value ...]
# Activate raysweep's environment before; it, the run directory and $HOME must be on storage that all nodes share. A quarter of
# the nodes audits, the others train. Three minutes before the time limit the sweep ends gracefully and is queued again.
set -euo pipefail
umask 077

export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.raysweep-token-$SLURM_JOB_ID RAY_TMPDIR=/tmp/ray-$SLURM_JOB_ID
python -c 'import secrets; print(secrets.token_hex(32))' > "$RAY_AUTH_TOKEN_PATH"
HEAD_HOST=$(python -c 'import ray; print(ray.util.get_node_ip_address())')
export HEAD_HOST HEAD_PORT=$((20000 + SLURM_JOB_ID % 12000)) AUDIT_NODES=$(((SLURM_NNODES + 3) / 4))

# shellcheck disable=SC2016  # each node expands it
srun --ntasks-per-node=1 --cpu-bind=none --no-kill --kill-on-bad-exit=0 bash -c '
  options=(--block --num-cpus="$SLURM_CPUS_ON_NODE" --resources="{\"trial_slot\": 64}")
  if ((SLURM_NNODES > 1)); then
    if ((SLURM_NODEID < AUDIT_NODES)); then options+=(--labels=role=audit); else options+=(--labels=role=train); fi
  fi
  if ((SLURM_NODEID == 0)); then
    exec ray start --head --node-ip-address="$HEAD_HOST" --port="$HEAD_PORT" "${options[@]}"
  fi
  until (echo > "/dev/tcp/$HEAD_HOST/$HEAD_PORT") 2> /dev/null; do sleep 1; done
  exec ray start --address="$HEAD_HOST:$HEAD_PORT" "${options[@]}"
' &
cluster=$!
trap 'kill "$cluster" 2> /dev/null || true; wait "$cluster" || true; rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT

export RAY_ADDRESS=$HEAD_HOST:$HEAD_PORT
joined() {
  python -c 'import ray; ray.init(logging_level="ERROR"); print(sum(n["Alive"] for n in ray.nodes()))' 2> /dev/null || echo 0
}
until nodes=$(joined); ((nodes >= SLURM_NNODES)); do
  if ((SECONDS > 300)) || ! kill -0 "$cluster" 2> /dev/null; then
    echo "raysweep - $nodes of $SLURM_NNODES nodes have joined the Ray cluster; see the output above" >&2
    exit 1
  fi
  sleep 2
done

again=0 ended=0 sweep=
end_sweep() {
  ended=1
  if [ -n "$sweep" ]; then kill -TERM "$sweep" 2> /dev/null || true; fi
}
trap 'again=1; end_sweep' USR1 # from Slurm, before the time limit
trap end_sweep TERM            # from scancel --batch --signal=TERM: ends gracefully, for good
python -m raysweep run "$@" &
sweep=$!
if ((ended)); then end_sweep; fi
code=0
while true; do
  wait "$sweep" && code=0 || code=$?
  kill -0 "$sweep" 2> /dev/null || break # else a signal has interrupted the wait
done
if ((again && (code == 130 || code == 143))); then scontrol requeue "$SLURM_JOB_ID"; fi # 143: before it had begun
exit "$code"
