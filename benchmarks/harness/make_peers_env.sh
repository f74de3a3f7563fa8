#!/bin/sh
# Create .venv-peers in the repository root: the peers' libraries, separate from the project's own environment.
# Does nothing if it is already complete. Usage: PYTHON=python3.12 benchmarks/harness/make_peers_env.sh
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
env_dir="$(dirname -- "$(dirname -- "$here")")/.venv-peers"
requirements="$here/requirements-peers.txt"
python=${PYTHON:-python3}

# The stamp is written last, so that an interrupted install is repeated.
stamp="$env_dir/.complete"
want=$("$python" -c 'import hashlib, sys
print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest(), sys.version.split()[0])' "$requirements")
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
    echo "$env_dir is up to date"
    exit 0
fi

"$python" -m venv --clear "$env_dir"
pip() { "$env_dir/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

# Install torch with its dependencies: a CUDA build needs its libraries, and the index decides which build it is.
pip install --constraint "$requirements" torch
# --no-deps keeps torchvision out: nnsight requires it, but it pulls in another torch, and its operators break
# transformers.
pip install --no-deps --requirement "$requirements"
pip uninstall --yes torchvision >/dev/null 2>&1 || true

SPARSIFY_DISABLE_TRITON=1 WANDB_MODE=disabled "$env_dir/bin/python" -c '
import sae_lens, sparsify
import dictionary_learning.trainers.top_k
'
echo "$want" >"$stamp"
echo "created $env_dir"
