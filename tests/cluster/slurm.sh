#!/usr/bin/env bash
# The same pretraining through a real Slurm of two nodes (nodes.sh): `sbatch launch/slurm/pretrain.sbatch` and
# torchrun.sbatch as they are, told only sizes and arguments. The loss has to be that of one node without Slurm.
#
#   tests/cluster/slurm.sh        two minutes on two cores; exit code 0: all the same, 77: cannot be run here
#
# munged, slurmctld and one slurmd per node run from a folder of this test, on their usual ports inside the nodes.
# Needs what nodes.sh needs, Debian's slurm-wlm and munge, and the package's environment first in PATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. tests/cluster/nodes.sh
. tests/cluster/pretraining.sh

why=$(lacking /usr/sbin/slurmctld /usr/sbin/slurmd /usr/sbin/munged sbatch srun deepspeed torchrun)
[ -z "$why" ] || { echo "skipped: $why"; exit 77; }
scratch=$(mktemp -d)
trap 'end_nodes; rm -rf "$scratch"' EXIT
make_nodes "$scratch"
prepare "$scratch"

# Slurm lets nobody in whom munge's key does not vouch for. One munged serves both nodes: its socket is a file.
slurm=$scratch/slurm
mkdir -p "$slurm/state" "$slurm/munge" && chmod 711 "$scratch" && chmod 755 "$slurm" "$slurm/munge"
head -c 1024 /dev/urandom > "$slurm/munge/key" && chmod 400 "$slurm/munge/key"
on a /usr/sbin/munged --force --socket="$slurm/munge/socket" --key-file="$slurm/munge/key" \
  --pid-file="$slurm/munge/pid" --log-file="$slurm/munge/log" --seed-file="$slurm/munge/seed"
cat > "$slurm/slurm.conf" << EOF
ClusterName=test
SlurmctldHost=node-a(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$slurm/munge/socket
StateSaveLocation=$slurm/state
SlurmdSpoolDir=$slurm/spool-%n
SlurmctldPidFile=$slurm/slurmctld.pid
SlurmdPidFile=$slurm/slurmd-%n.pid
SlurmctldLogFile=$slurm/slurmctld.log
SlurmdLogFile=$slurm/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
SelectTypeParameters=CR_Core
NodeName=node-a NodeAddr=10.77.0.1 CPUs=4
NodeName=node-b NodeAddr=10.77.0.2 CPUs=4
PartitionName=all Nodes=node-a,node-b Default=YES OverSubscribe=YES
EOF
export SLURM_CONF=$slurm/slurm.conf
on a /usr/sbin/slurmctld
on a /usr/sbin/slurmd -N node-a
on b /usr/sbin/slurmd -N node-b
for _ in $(seq 100); do
  [ "$(on a sinfo --noheader --format %D --states idle)" = 2 ] && break
  sleep 0.2
done
if [ "$(on a sinfo --noheader --format %D --states idle)" != 2 ]; then
  echo "Slurm's nodes did not come up:"
  tail -n 15 "$slurm"/*.log
  exit 1
fi

echo "$(sbatch --version), $(on a sinfo --noheader --format '%D nodes %N')"
header
flags one_node
run one_node on a deepspeed --num_gpus 2 launch/pretrain.py "${words[@]}"
compare one_node one_node

submit() { # name, then words of sbatch, the script, and its arguments
  local name=$1
  shift
  run "$name" on a sbatch --wait --output "$scratch/$name.out" "$@"
  [ -e "$scratch/$name/checkpoints/latest" ] || { tail -n 40 "$scratch/$name.out" || true; }
}

flags sbatch_srun
submit sbatch_srun --nodes 2 --ntasks-per-node 1 launch/slurm/pretrain.sbatch "${words[@]}"
compare sbatch_srun one_node

flags sbatch_srun_one_node
submit sbatch_srun_one_node --nodes 1 --ntasks-per-node 2 launch/slurm/pretrain.sbatch "${words[@]}"
compare sbatch_srun_one_node one_node

flags sbatch_torchrun
submit sbatch_torchrun --nodes 2 launch/slurm/torchrun.sbatch "${words[@]}"
compare sbatch_torchrun one_node

# In the shell of a batch job plain python and deepspeed are no tasks of srun.
cat > "$scratch/shell.sbatch" << 'EOF'
#!/usr/bin/env bash
env | grep ^SLURM_ | sort
srun env | grep -E '^SLURM_(STEP|PROCID|LOCALID|NODEID)' | sort
deepspeed --num_gpus 2 launch/pretrain.py "$@"
EOF
flags sbatch_deepspeed
submit sbatch_deepspeed --nodes 2 --ntasks-per-node 1 "$scratch/shell.sbatch" "${words[@]}"
compare sbatch_deepspeed one_node

# Preemption: what --signal sends before the time limit is sent by hand. All ranks save, the script puts the job back into the
# queue, and the whole has the losses of a run that nobody stopped.
preempted() { # name, what is signalled (words of scancel), then words of sbatch
  local name=$1 id state
  local -a signalled=($2)
  shift 2
  flags "$name"
  id=$(on a sbatch --parsable --output "$scratch/$name.out" "$@" "${words[@]}")
  for _ in $(seq 600); do
    [ "$(cat "$scratch/$name/metrics.jsonl" 2> /dev/null | wc -l)" -lt 5 ] || break
    sleep 0.2
  done
  on a scancel "${signalled[@]}" "$id"
  for _ in $(seq 600); do
    state=$(on a squeue --noheader --states all --format %T --jobs "$id" || true)
    [ "$state" != PENDING ] || on a scontrol update "JobId=$id" StartTime=now 2> /dev/null || true # Slurm waits 2 minutes
    [ "$state" != COMPLETED ] || break # FAILED and CANCELLED are shown for a moment on the way back into the queue
    sleep 0.5
  done
  grep -h 'pretrain: preempted\|back into the queue\|resumed from' "$scratch/$name.out" | sed "s/^/  /; s#$scratch/##g"
  [ "$state" = COMPLETED ] && grep -q 'resumed from' "$scratch/$name.out" && [ -e "$scratch/$name/checkpoints/latest" ]
}
steps=60
flags one_node_long
run one_node_long on a deepspeed --num_gpus 2 launch/pretrain.py "${words[@]}"
seconds=0
echo
for case in "preempted_srun --signal=USR1|--nodes 2 --ntasks-per-node 1 launch/slurm/pretrain.sbatch" \
  "preempted_torchrun --batch --signal=USR1|--nodes 2 launch/slurm/torchrun.sbatch"; do
  read -r name signalled <<< "${case%%|*}"
  begin=$SECONDS
  preempted "$name" "$signalled" ${case#*|} || { echo "$name: FAILED"; tail -n 40 "$scratch/$name.out"; failures=$((failures + 1)); }
  seconds=$((SECONDS - begin))
  compare "$name" one_node_long
done

# Cancelled: it saves as well, but is not to come back.
for script in pretrain torchrun; do
  flags "cancelled_$script"
  id=$(on a sbatch --parsable --output "$scratch/cancelled_$script.out" --nodes 2 --ntasks-per-node 1 "launch/slurm/$script.sbatch" "${words[@]}")
  for _ in $(seq 600); do
    [ "$(cat "$scratch/cancelled_$script/metrics.jsonl" 2> /dev/null | wc -l)" -lt 5 ] || break
    sleep 0.2
  done
  on a scancel "$id"
  for _ in $(seq 60); do
    state=$(on a scontrol show job "$id" | grep -o 'JobState=[A-Z]*\|Restarts=[0-9]*' | tr '\n' ' ')
    [ "$state" != "JobState=CANCELLED Restarts=0 " ] || break
    sleep 1
  done
  sleep 3 # until the script's own last lines have run
  state=$(on a scontrol show job "$id" | grep -o 'JobState=[A-Z]*\|Restarts=[0-9]*' | tr '\n' ' ')
  echo "cancelled_$script: $state"
  [ "$state" = "JobState=CANCELLED Restarts=0 " ] && ! grep -q "back into the queue" "$scratch/cancelled_$script.out" || failures=$((failures + 1))
done

[ -z "${KEEP:-}" ] || cp "$scratch"/*.out "$scratch"/*.log "$KEEP"
if [ $failures = 0 ]; then echo "all the same"; else echo "$failures FAILED"; exit 1; fi
