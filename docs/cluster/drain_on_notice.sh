#!/bin/bash
# Drains this node from its Ray cluster when EC2 announces, two minutes before, that it takes the instance back.
# cluster.yaml starts it on every worker. RAY_HEAD_IP: the head's address.
export RAY_ADDRESS=$RAY_HEAD_IP:6379
metadata=${EC2_METADATA:-http://169.254.169.254}/latest
while sleep 5; do
  token=$(curl -sf -m 2 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' "$metadata/api/token") || continue
  curl -sf -m 2 -H "X-aws-ec2-metadata-token: $token" "$metadata/meta-data/spot/instance-action" || continue
  ray drain-node --address "$RAY_ADDRESS" --reason DRAIN_NODE_REASON_PREEMPTION \
    --reason-message 'EC2 takes the spot instance back' --deadline-remaining-seconds 110 && exit
done
