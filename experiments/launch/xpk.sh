#!/usr/bin/env bash
# The same as gke_jobset.yaml, through xpk (https://github.com/AI-Hypercomputer/xpk), which
# writes the JobSet itself.
#
#   CLUSTER=my-cluster IMAGE=REGION-docker.pkg.dev/PROJECT/REPOSITORY/effjax:TAG \
#     experiments/launch/xpk.sh my-run --config configs/quickstart.py \
#     --workdir /shared/runs/quickstart --config.mesh.preset=fsdp
#
# Once, before: `xpk storage attach` gives every pod of the cluster the shared file system
# with the run folder. TPU_TYPE and NUM_SLICES choose the devices; several slices are
# joined by the data center's network: presets dp, hsdp or pp.
set -eu

: "${CLUSTER:?the cluster}" "${IMAGE:?an image with effjax in it}"
workload=${1:?usage: $0 NAME [argument of effjax run ...]}
shift

arguments=$(printf ' %q' "$@")

exec xpk workload create \
  --cluster="$CLUSTER" \
  --workload="$workload" \
  --tpu-type="${TPU_TYPE:-v5litepod-16}" \
  --num-slices="${NUM_SLICES:-1}" \
  --docker-image="$IMAGE" \
  --max-restarts=20 \
  --termination-grace-period-seconds=300 \
  --command="effjax run$arguments"
