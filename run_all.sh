#!/usr/bin/env bash
# Everything in one command: train (or go on, if checkpoints are there), sample 1000 digits, score them, adapt between domains, draw the figures.
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
if [ $# -eq 2 ]; then data=(--data "$1"); fast=(); targets=(svhn usps); else data=(); fast=(--fast); targets=(svhn); fi
p4() { python3 "$here/p4_dann.py" ${data[@]+"${data[@]}"} "$@"; }
p2() { python3 "$here/p2_diffusion.py" --ckpt "$out/p2_diffusion.pt" "$@"; }

resume=()
if [ -e "$out/p2_diffusion.pt" ]; then resume=(--resume); fi
p2 --mode train ${data[@]+"${data[@]}"} ${fast[@]+"${fast[@]}"} ${resume[@]+"${resume[@]}"}
p2 --mode sample --out "$out/digits"
p2 --mode eval --input "$out/digits" ${data[@]+"${data[@]}"} --out "$out/p2_scores.json"
p2 --mode grid --out "$out/figures"
p4 --mode table --scenarios "${targets[@]/#/mnistm-}" --seeds 0 ${fast[@]+"${fast[@]}"} --ckpt "$out" --out "$out/p4_table"
for target in "${targets[@]}"; do
  p4 --mode tsne --target "$target" --ckpt "$out/p4_dann-mt_mnistm_${target}_deep_0.pt" --out "$out/figures"
done
echo "results: $out/digits (1000 images), $out/p2_scores.json, $out/p4_table, $out/figures"
