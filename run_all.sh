#!/usr/bin/env bash
# Everything in one command: train (or go on, if a checkpoint is there), sample 1000 digits, score them, draw the figures.
#
#   bash run_all.sh            built-in digits, a few minutes, results in results/
#   bash run_all.sh IN OUT     the course's data in IN, results in OUT; after an interruption, the same call goes on where it stopped
set -euo pipefail
if [ $# -ne 0 ] && [ $# -ne 2 ]; then
  echo "usage: bash run_all.sh [IN OUT]" >&2
  exit 2
fi
here=$(CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
out=${2:-results}
if [ $# -eq 2 ]; then data=(--data "$1"); train=(); else data=(); train=(--fast); fi
p2() { python3 "$here/p2_diffusion.py" --ckpt "$out/p2_diffusion.pt" "$@"; }

if [ -e "$out/p2_diffusion.pt" ]; then train+=(--resume); fi
p2 --mode train ${data[@]+"${data[@]}"} ${train[@]+"${train[@]}"}
p2 --mode sample --out "$out/digits"
p2 --mode eval --input "$out/digits" ${data[@]+"${data[@]}"} --out "$out/p2_scores.json"
p2 --mode grid --out "$out/figures"
echo "results: $out/digits (1000 images), $out/p2_scores.json, $out/figures"
