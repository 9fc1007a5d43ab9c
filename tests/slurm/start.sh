#!/usr/bin/env bash
# A Slurm of one node on this machine, for the tests: tests/slurm/start.sh FOLDER
#
# Everything lies in FOLDER: keys, logs, state and slurm.conf, by which Slurm's commands find it (SLURM_CONF). Several
# can go on at once, each on ports of its own. Stays in the foreground, says "ready" when the node is, and takes the
# cluster down when it ends. Installs Slurm by apt where it is missing; status 77 where that is impossible. Needs no
# systemd. Two partitions: a job in `high` preempts those in `low`, which are requeued.
set -euo pipefail
folder=$(realpath -m "$1")
mkdir -p "$folder"/{state,spool}
export PATH=$PATH:/usr/sbin:/sbin

if ! { command -v slurmctld && command -v slurmd && command -v munged; } >"$folder/install.log"; then
  exec 9>/tmp/dsam-slurm-install.lock
  flock 9 # two tests at once: apt takes one
  if ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurm-wlm munge; } \
    </dev/null >>"$folder/install.log" 2>&1; then
    echo "Slurm is not here and cannot be installed: $(tail -n 1 "$folder/install.log")"
    exit 77
  fi
  exec 9>&-
fi

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
user=$(id -un) host=$(hostname -s) cores=$(env -u OMP_NUM_THREADS nproc)
export SLURM_CONF=$folder/slurm.conf
cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
# A requeued job waits as long as a credential is valid.
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
# Needs no cgroups. Signals reach each process of a job, not only the first: harder on the runs than proctrack/cgroup.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cores
PartitionName=low Nodes=$host Default=YES PriorityTier=1 PreemptMode=REQUEUE MaxTime=INFINITE State=UP
PartitionName=high Nodes=$host PriorityTier=2 PreemptMode=OFF MaxTime=INFINITE State=UP
CONF

started=()
down() {
  trap - EXIT
  scancel --user="$user" 2>/dev/null || true
  for _ in $(seq 100); do [ -z "$(squeue --noheader 2>/dev/null)" ] && break || sleep 0.2; done
  for ((i = ${#started[@]} - 1; i >= 0; i--)); do kill "${started[i]}" 2>/dev/null || true; done
  wait
}
trap down EXIT
trap 'exit 0' TERM INT

head -c 128 /dev/urandom >"$folder/munge.key"
chmod 600 "$folder/munge.key"
munged --foreground --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" \
  --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munged.seed" \
  >"$folder/munged.out" 2>&1 &
started+=($!)
for _ in $(seq 100); do [ -S "$folder/munge.socket" ] && break || sleep 0.1; done
slurmctld -D >"$folder/slurmctld.out" 2>&1 &
started+=($!)
slurmd -D -N "$host" >"$folder/slurmd.out" 2>&1 &
started+=($!)
for _ in $(seq 150); do
  [ "$(sinfo --noheader --partition=low --format=%t 2>/dev/null)" = idle ] && break || sleep 0.2
done
if [ "$(sinfo --noheader --partition=low --format=%t)" != idle ]; then
  tail -n 20 "$folder"/*.log "$folder"/*.out
  exit 1
fi
echo ready
wait
