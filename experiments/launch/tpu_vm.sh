#!/usr/bin/env bash
# Runs a recipe on all hosts of a TPU slice, by the same command on each.
#
#   TPU_NAME=my-slice ZONE=us-east5-a experiments/launch/tpu_vm.sh \
#     --config configs/quickstart.py --workdir /mnt/shared/runs/quickstart \
#     --config.mesh.preset=fsdp
#
# Once, before: effjax and its environment on every host, and a file system that all of
# them share (Filestore, by NFS; a bucket mounted as a folder has no locks and no renaming
# of folders), such as by
#
#   gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=all --command='
#     sudo apt-get install -y nfs-common && sudo mkdir -p /mnt/shared &&
#     sudo mount -o rw,hard FILESTORE_ADDRESS:/share /mnt/shared &&
#     git clone REPOSITORY effjax && cd effjax &&
#     python3 -m venv .venv && .venv/bin/pip install -e ".[tpu]"'
#
# effjax asks the metadata server of the slice where the hosts are. A slice that is
# preempted gets SIGTERM on its hosts: the run is saved and ends with code 4, and the same
# command on a new slice resumes it, on one of another size, too.
set -eu

: "${TPU_NAME:?the name of the TPU slice}" "${ZONE:?its zone}"
repository=${REPOSITORY:-effjax} # the folder on the hosts

# Quoted, as the shell on the hosts reads them.
arguments=$(printf ' %q' "$@")

exec gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=all \
  --command="cd $repository && EFFJAX_CACHE=\$HOME/effjax-cache .venv/bin/effjax run$arguments"
