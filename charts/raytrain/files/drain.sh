#!/usr/bin/env bash
# preStop hook of a worker on a spot instance: tells Ray that this node goes in $1 seconds, and waits, so that
# the training can save what it has before the pod is ended.
set -uo pipefail

readonly margin=15 # for Ray's own end, and the kubelet
readonly left=$(($1 - margin))

ray drain-node --reason=DRAIN_NODE_REASON_PREEMPTION --reason-message="the pod is being ended" \
  --deadline-remaining-seconds="$left"

# A head that is gone has nothing left to save: the job has ended, and the node is free.
while ((SECONDS < left)) && (exec 3<>"/dev/tcp/$FQ_RAY_IP/$RAY_PORT") 2>/dev/null; do
  sleep 2
done
