#!/usr/bin/env bash
# Everything in one command: train what is missing, sample, score, draw the figures, write a report.
#
#   bash run_all.sh                          built-in data, minutes, results in results/
#   bash run_all.sh IN OUT [p1 p2 p3 p4]     the course's data in IN, results in OUT; after an interruption the same call goes on where it stopped
#
# The graders' calls, with the checkpoints that training leaves in checkpoints/ beside this file:
#
#   bash run_all.sh p1 OUT                   1000 faces                          hw2_1.sh of 2022
#   bash run_all.sh p2 OUT                   0_001.png ... 9_100.png             hw2_2.sh of 2022, hw2_1.sh of 2023
#   bash run_all.sh p3 NOISE OUT UNET        NN.png for every NN.pt              hw2_2.sh of 2023
#   bash run_all.sh p4 IMAGES OUT.csv        image_name,label                    hw2_3.sh of 2022 and 2023
set -euo pipefail
here=$(CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
usage() { sed -n '3,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }

case "$#:${1-}" in
  2:p1) exec python3 "$here/p1_gan.py" --mode sample --out "$2" --ckpt "$here/checkpoints/p1_sngan.pt" ;;
  2:p2) exec python3 "$here/p2_diffusion.py" --mode sample --out "$2" --ckpt "$here/checkpoints/p2_diffusion_unet.pt" ;;
  4:p3) exec python3 "$here/p3_ddim.py" --mode sample --noise "$2" --out "$3" --ckpt "$4" ;;
  3:p4) images=$(CDPATH="" cd -- "$(dirname -- "$2")" && pwd)/$(basename -- "$2"); csv=$(CDPATH="" cd -- "$(dirname -- "$3")" && pwd)/$(basename -- "$3")
        cd "$here" && exec python3 p4_dann.py --mode predict --input "$images" --out "$csv" ;;
  0:) in=; out=results; problems=(p1 p2 p3 p4) ;;
  *) [ $# -ge 2 ] && [ -d "$1" ] || usage
     in=$1; out=$2; shift 2; problems=("$@"); [ $# -gt 0 ] || problems=(p1 p2 p3 p4) ;;
esac

data=(); fast=(--fast)
if [ -n "$in" ]; then data=(--data "$in"); fast=(); fi
mkdir -p "$out"

run() {  # a command, and its time for the report
  local start=$SECONDS
  echo "+ $*"
  "$@"
  printf '%s\t%s\n' "$((SECONDS - start))" "$*" >> "$out/commands.tsv"
}
train() {  # checkpoint, script, options: goes on where an earlier call stopped
  local ckpt=$1 resume=()
  if [ -e "$ckpt" ]; then resume=(--resume); fi
  run python3 "$here/$2" --mode train --ckpt "$ckpt" ${data[@]+"${data[@]}"} "${@:3}" ${resume[@]+"${resume[@]}"}
}

for problem in "${problems[@]}"; do
  case $problem in
    p1)
      for method in dcgan sngan acgan; do
        train "$out/p1_$method.pt" p1_gan.py --method "$method" ${fast[@]+"${fast[@]}"}
        run python3 "$here/p1_gan.py" --mode sample --ckpt "$out/p1_$method.pt" --method "$method" --out "$out/p1_$method"
        if [ -n "$in" ]; then
          run python3 "$here/p1_gan.py" --mode eval --method "$method" --ckpt "$out/p1_$method.pt" --input "$out/p1_$method" --data "$in" --out "$out/p1_$method.json"
        fi
      done
      run python3 "$here/p1_gan.py" --mode grid --ckpt "$out/p1_dcgan.pt" "$out/p1_sngan.pt" --out "$out/p1_figures"
      run python3 "$here/p1_gan.py" --mode grid --ckpt "$out/p1_acgan.pt" --out "$out/p1_figures" ;;
    p2)
      train "$out/p2_diffusion.pt" p2_diffusion.py ${fast[@]+"${fast[@]}"}
      run python3 "$here/p2_diffusion.py" --mode sample --ckpt "$out/p2_diffusion.pt" --out "$out/p2_digits"
      run python3 "$here/p2_diffusion.py" --mode eval --ckpt "$out/p2_diffusion.pt" --input "$out/p2_digits" ${data[@]+"${data[@]}"} --out "$out/p2_digits.json"
      run python3 "$here/p2_diffusion.py" --mode grid --ckpt "$out/p2_diffusion.pt" --out "$out/p2_figures" ;;
    p3)
      train "$out/p3_ddim.pt" p3_ddim.py ${fast[@]+"${fast[@]}"}
      num=64; if [ -n "$in" ]; then num=1000; fi
      run python3 "$here/p3_ddim.py" --mode sample --sampler dpm++ --ckpt "$out/p3_ddim.pt" --num "$num" --out "$out/p3_faces"
      if [ -n "$in" ]; then
        run python3 "$here/p3_ddim.py" --mode eval --input "$out/p3_faces" --data "$in" --out "$out/p3_faces.json"
      fi
      for mode in grid eta-grid interpolate; do
        run python3 "$here/p3_ddim.py" --mode "$mode" --ckpt "$out/p3_ddim.pt" --out "$out/p3_figures"
      done ;;
    p4)
      targets=(svhn); if [ -n "$in" ]; then targets=(svhn usps); fi
      run python3 "$here/p4_dann.py" --mode table --scenarios "${targets[@]/#/mnistm-}" --seeds 0 --ckpt "$out" --out "$out/p4_table" ${data[@]+"${data[@]}"} ${fast[@]+"${fast[@]}"}
      for target in "${targets[@]}"; do
        run python3 "$here/p4_dann.py" --mode tsne --target "$target" --ckpt "$out/p4_dann-mt_mnistm_${target}_deep_0.pt" --out "$out/p4_figures" ${data[@]+"${data[@]}"}
      done ;;
    *) usage ;;
  esac
done
run python3 "$here/common.py" report "$out"
