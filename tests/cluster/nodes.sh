# Two computers on one: sourced by two_nodes.sh and slurm.sh.
#
#   make_nodes WORK    starts node-a (10.77.0.1) and node-b (10.77.0.2), and an sshd in each
#   on a COMMAND…      runs a command on node-a, with this shell's environment and folder
#   end_nodes          ends both, and every process on them
#
# A node is a set of Linux namespaces: network, host name, mounts, process ids. A veth pair joins the two networks, and
# nothing leads out of them. Nothing outside the namespaces and WORK is changed: ssh's keys and settings and /etc/hosts
# are mounted over the machine's own inside a node only. When the first process of a node ends, the kernel ends the
# others and removes the network, so nothing can be left behind, whatever fails.
#
# /etc/hosts is as Debian's installer writes it: a node's own name means 127.0.1.1 on that node.
#
# Needs: root, iproute2, util-linux, openssh (client and server).

node_pids=()

lacking() { # why the two nodes cannot be made here; nothing where they can
  [ "$(id -u)" = 0 ] || { echo "not root"; return; }
  local command
  for command in ip unshare nsenter ssh ssh-keygen /usr/sbin/sshd "$@"; do
    command -v "$command" > /dev/null || { echo "no $command"; return; }
  done
  unshare --net --mount --uts --pid --fork true 2> /dev/null || echo "no right to make namespaces"
}

make_nodes() {
  local work=$1 letter
  mkdir -p "$work/ssh"
  ssh-keygen -q -t ed25519 -N '' -f "$work/ssh/host_key"
  ssh-keygen -q -t ed25519 -N '' -f "$work/ssh/user_key"
  cp "$work/ssh/user_key.pub" "$work/ssh/authorized_keys"
  echo "node-a,node-b,10.77.0.1,10.77.0.2 $(cut -d ' ' -f 1,2 "$work/ssh/host_key.pub")" > "$work/ssh/known_hosts"
  cat > "$work/ssh/ssh_config" << EOF
IdentityFile /etc/ssh/user_key
GlobalKnownHostsFile /etc/ssh/known_hosts
UserKnownHostsFile /dev/null
StrictHostKeyChecking yes
BatchMode yes
LogLevel ERROR
EOF
  cat > "$work/ssh/sshd_config" << EOF
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
EOF
  start_node a 1 "$work"
  start_node b 2 "$work"
  ip link add veth-a netns "${node_pids[0]}" type veth peer name veth-b netns "${node_pids[1]}"
  for letter in a b; do
    on $letter ip link set lo up
    on $letter ip address add "10.77.0.$([ $letter = a ] && echo 1 || echo 2)/24" dev "veth-$letter"
    on $letter ip link set "veth-$letter" up
    on $letter /usr/sbin/sshd -E "$work/sshd-$letter.log"
  done
  on a ssh node-b true
  on b ssh node-a true
}

start_node() { # letter, number, work: the first process of a node, which holds its namespaces
  local letter=$1 number=$2 work=$3
  { echo "127.0.0.1 localhost"; echo "127.0.1.1 node-$letter"
    echo "10.77.0.$((3 - number)) node-$([ "$letter" = a ] && echo b || echo a)"; } > "$work/hosts-$letter"
  unshare --net --mount --uts --ipc --pid --fork --kill-child --mount-proc bash -c "
    exec 2>> '$work/node-$letter.log'
    mount --bind '$work/hosts-$letter' /etc/hosts
    mount --bind '$work/ssh' /etc/ssh
    mount -t tmpfs none /run && mkdir -p /run/sshd
    hostname node-$letter
    touch '$work/node-$letter.ready'
    while :; do sleep 3600 & wait; done" 2> /dev/null & # it complains when its child is killed
  while [ ! -e "$work/node-$letter.ready" ]; do sleep 0.05; done
  node_pids+=("$(pgrep -P $! | head -1)") # unshare --fork: the node's process 1 is its child
}

on() { # letter, command…; for LIMIT seconds at most
  local pid=${node_pids[0]}
  [ "$1" = a ] || pid=${node_pids[1]}
  shift
  nsenter --target "$pid" --net --mount --uts --ipc --pid --wd="$PWD" -- timeout -k 5 "${LIMIT:-150}" "$@"
}

end_nodes() {
  local pid
  for pid in "${node_pids[@]}"; do kill -KILL "$pid" 2> /dev/null || true; done
  node_pids=()
  wait 2> /dev/null || true
}
