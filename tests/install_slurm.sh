#!/usr/bin/env bash
# Debian's Slurm as a cluster of this one machine, for tests/sweeps/test_slurm.py. Needs root.
#   bash tests/install_slurm.sh          install and start
#   bash tests/install_slurm.sh stop     stop
set -euo pipefail

stop() {
  for file in /run/mtp-slurmctld.pid /run/mtp-slurmd.pid /run/munge/munged.pid; do
    [ -f "$file" ] && kill "$(cat "$file")" 2>/dev/null || true
    rm -f "$file"
  done
}
if [ "${1:-}" = stop ]; then
  stop
  exit
fi

if ! command -v slurmctld slurmd munged >/dev/null; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge
fi
stop

# Munge signs who sent a request; one key serves the one machine.
mkdir -p /run/munge /var/log/munge /var/lib/munge
chown munge: /run/munge /var/log/munge /var/lib/munge /etc/munge
if [ ! -s /etc/munge/munge.key ]; then
  dd if=/dev/urandom of=/etc/munge/munge.key bs=1 count=1024 status=none
fi
chown munge: /etc/munge/munge.key
chmod 400 /etc/munge/munge.key

host=$(hostname -s)
memory=$(($(awk '/MemAvailable/ {print $2}' /proc/meminfo) / 1024))
mkdir -p /etc/slurm /var/spool/mtp-slurmctld /var/spool/mtp-slurmd
cat > /etc/slurm/slurm.conf <<EOF
ClusterName=mtp
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
# No control groups: containers often have none to give.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmctldPidFile=/run/mtp-slurmctld.pid
SlurmdPidFile=/run/mtp-slurmd.pid
StateSaveLocation=/var/spool/mtp-slurmctld
SlurmdSpoolDir=/var/spool/mtp-slurmd
SlurmctldLogFile=/var/log/mtp-slurmctld.log
SlurmdLogFile=/var/log/mtp-slurmd.log
MailProg=/bin/true
JobCompType=jobcomp/none
# Requeued at once, so that the tests need not wait.
SchedulerParameters=requeue_delay=1
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
EOF

runuser -u munge -- munged --pid-file=/run/munge/munged.pid
slurmctld
slurmd
for _ in $(seq 30); do
  if [ "$(sinfo -h -o %T 2>/dev/null)" = idle ]; then
    sinfo
    exit
  fi
  scontrol update nodename="$host" state=resume 2>/dev/null || true
  sleep 1
done
echo "the node is not idle:" >&2
sinfo >&2 || true
tail -n 20 /var/log/mtp-slurmctld.log /var/log/mtp-slurmd.log >&2
exit 1
