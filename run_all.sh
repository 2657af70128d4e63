#!/usr/bin/env bash
# Everything in one command: train what is missing, sample, score, draw the figures, write a report.
#
#   bash run_all.sh                          built-in data, minutes, results in results/
#   bash run_all.sh IN OUT [p1 p2 p3 p4]     the course's data in IN, results in OUT; after an interruption the same call goes on where it stopped
#
# The graders' calls, with checkpoints in checkpoints/ beside this file (train there, or: mkdir -p checkpoints && cp OUT/*.pt checkpoints/):
#
#   bash run_all.sh p1 OUT                     1000 faces                   hw2_p1.sh of 2021, hw2_1.sh of 2022
#   bash run_all.sh acgan OUT                  0_001.png ... 9_100.png      hw2_p2.sh of 2021
#   bash run_all.sh p2 OUT                     0_001.png ... 9_100.png      hw2_2.sh of 2022, hw2_1.sh of 2023
#   bash run_all.sh p3 NOISE OUT UNET          NN.png for every NN.pt       hw2_2.sh of 2023
#   bash run_all.sh p4 IMAGES OUT.csv          image_name,label             hw2_3.sh of 2022 and 2023
#   bash run_all.sh p4 IMAGES TARGET OUT.csv   the same with dann           hw2_p3.sh of 2021; SVHN is adapted from USPS there
#   bash run_all.sh bonus IMAGES TARGET OUT.csv   with dann-mt              hw2_bonus.sh of 2021
set -euo pipefail
here=$(CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
usage() { sed -n '2,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
absolute() { case $1 in /*) printf %s "$1" ;; *) printf %s "$PWD/$1" ;; esac; }
predict() {  # p4's default checkpoints are named from the folder that holds the scripts
  local options=(--input "$(absolute "$1")" --out "$(absolute "$2")")
  cd "$here" && exec python3 p4_dann.py --mode predict "${options[@]}" "${@:3}"
}

case "$#:${1-}" in
  2:p1) exec python3 "$here/p1_gan.py" --mode sample --out "$2" --ckpt "$here/checkpoints/p1_sngan.pt" ;;
  2:p2) exec python3 "$here/p2_diffusion.py" --mode sample --out "$2" --ckpt "$here/checkpoints/p2_diffusion_unet.pt" ;;
  4:p3) exec python3 "$here/p3_ddim.py" --mode sample --noise "$2" --out "$3" --ckpt "$4" ;;
  2:acgan) exec python3 "$here/p1_gan.py" --mode sample --method acgan --out "$2" --ckpt "$here/checkpoints/p1_acgan.pt" ;;
  3:p4) predict "$2" "$3" ;;
  4:p4|4:bonus) options=(--target "$3"); if [ "$3" = svhn ]; then options+=(--source usps); fi
        if [ "$1" = p4 ]; then options+=(--method dann); fi
        predict "$2" "$4" "${options[@]}" ;;
  0:) in=; out=results; problems=(p1 p2 p3 p4) ;;
  *) [ $# -ge 2 ] || usage
     [ -d "$1" ] || { echo "error: $1: no such folder" >&2; usage; }
     in=$1; out=$2; shift 2; problems=("$@"); [ $# -gt 0 ] || problems=(p1 p2 p3 p4) ;;
esac

for problem in "${problems[@]}"; do
  case $problem in p1|p2|p3|p4) ;; *) usage ;; esac
done
data=(); built_in=(--built-in); faces=yes
if [ -n "$in" ]; then
  data=(--data "$in"); built_in=()
  if ! [ -d "$in/face/train" ]; then
    faces=
    echo "$in/face/train: no such folder; the parts that learn from faces are left out"
  fi
fi
mkdir -p "$out"

run() {  # a command, and its time for the report
  local start=$SECONDS code=0
  echo "+ $*"
  "$@" || code=$?
  printf '%s\t%s\n' "$((SECONDS - start))" "$*" >> "$out/commands.tsv"
  if [ $code -ne 0 ]; then
    report > /dev/null || true  # of what there is
    exit $code
  fi
}
report() { python3 "$here/common.py" report "$out" ${built_in[@]+"${built_in[@]}"}; }
quick() { if [ -z "$in" ]; then echo "$*"; fi; }  # options of the built-in run
train() {  # checkpoint, script, options: goes on where an earlier call stopped
  local ckpt=$1 resume=()
  if [ -e "$ckpt" ]; then resume=(--resume); fi
  run python3 "$here/$2" --mode train --ckpt "$ckpt" ${data[@]+"${data[@]}"} "${@:3}" ${resume[@]+"${resume[@]}"}
}

for problem in "${problems[@]}"; do
  case $problem in
    p1)
      for method in ${faces:+dcgan ${in:+wgangp} sngan} acgan; do
        train "$out/p1_$method.pt" p1_gan.py --method "$method" $(quick --batch-size 16 --steps 200)
        run python3 "$here/p1_gan.py" --mode sample --ckpt "$out/p1_$method.pt" --method "$method" --out "$out/p1_$method"
        if [ -n "$in" ]; then
          run python3 "$here/p1_gan.py" --mode eval --method "$method" --ckpt "$out/p1_$method.pt" --input "$out/p1_$method" --data "$in" --out "$out/p1_$method.json"
        fi
      done
      if [ $faces ]; then run python3 "$here/p1_gan.py" --mode grid --ckpt "$out/p1_dcgan.pt" "$out/p1_sngan.pt" --out "$out/p1_figures"; fi
      run python3 "$here/p1_gan.py" --mode grid --ckpt "$out/p1_acgan.pt" --out "$out/p1_figures" ;;
    p2)
      train "$out/p2_diffusion_unet.pt" p2_diffusion.py $(quick --fast --steps 1000)
      run python3 "$here/p2_diffusion.py" --mode sample --ckpt "$out/p2_diffusion_unet.pt" --out "$out/p2_digits"
      run python3 "$here/p2_diffusion.py" --mode eval --ckpt "$out/p2_diffusion_unet.pt" --input "$out/p2_digits" ${data[@]+"${data[@]}"} --out "$out/p2_digits.json"
      run python3 "$here/p2_diffusion.py" --mode grid --ckpt "$out/p2_diffusion_unet.pt" --out "$out/p2_figures" ;;
    p3)
      if [ -n "$in" ] && [ -e "$in/face/UNet.pt" ]; then  # the course's network and noises of 2023
        given=(--ckpt "$in/face/UNet.pt" --noise "$in/face/noise")
        run python3 "$here/p3_ddim.py" --mode sample "${given[@]}" --out "$out/p3_given"
        if [ -d "$in/face/GT" ]; then run python3 "$here/p3_ddim.py" --mode mse --input "$out/p3_given" --gt "$in/face/GT" --out "$out/p3_given.json"; fi
        run python3 "$here/p3_ddim.py" --mode eta-grid "${given[@]}" --out "$out/p3_figures"
        run python3 "$here/p3_ddim.py" --mode interpolate "${given[@]}" --out "$out/p3_figures"
      fi
      if [ $faces ]; then
        train "$out/p3_ddim.pt" p3_ddim.py $(quick --fast --steps 400)
        num=64; if [ -n "$in" ]; then num=1000; fi
        run python3 "$here/p3_ddim.py" --mode sample --sampler dpm++ --ckpt "$out/p3_ddim.pt" --num "$num" --out "$out/p3_faces"
        if [ -n "$in" ]; then
          run python3 "$here/p3_ddim.py" --mode eval --input "$out/p3_faces" --data "$in" --out "$out/p3_faces.json"
        fi
        run python3 "$here/p3_ddim.py" --mode grid --ckpt "$out/p3_ddim.pt" --out "$out/p3_figures"
        if [ -z "$in" ] || ! [ -e "$in/face/UNet.pt" ]; then
          run python3 "$here/p3_ddim.py" --mode eta-grid --ckpt "$out/p3_ddim.pt" --out "$out/p3_figures"
          run python3 "$here/p3_ddim.py" --mode interpolate --ckpt "$out/p3_ddim.pt" --out "$out/p3_figures"
        fi
      fi ;;
    p4)
      targets=(svhn usps); scenarios=()
      if [ -z "$in" ]; then targets=(svhn); scenarios=(--scenarios mnistm-svhn); fi
      run python3 "$here/p4_dann.py" --mode table ${scenarios[@]+"${scenarios[@]}"} --seeds 0 --ckpt "$out" --out "$out/p4_table" ${data[@]+"${data[@]}"} $(quick --fast)
      for target in "${targets[@]}"; do
        run python3 "$here/p4_dann.py" --mode tsne --target "$target" --ckpt "$out/p4_dann-mt_mnistm_${target}_deep_0.pt" --out "$out/p4_figures" ${data[@]+"${data[@]}"}
      done ;;
  esac
done
report
