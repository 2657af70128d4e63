#!/usr/bin/env bash
# Everything in one command: samples, scores, figures, and a page of it all.
#
#   bash run_all.sh                          with the weights that come with it, minutes, results in results/
#   bash run_all.sh --train                  trains on built-in data first, 14 minutes, results in results-train/
#   bash run_all.sh IN OUT [p1 p2 p3 p4]     trains on the course's data in IN, an hour; called again it goes on
#   bash run_all.sh --full IN OUT [p1 ...]   the same with all steps and all methods, a day
#   bash run_all.sh IN OUT reports [NAME...] the systems of the five reports, 2021 2022a 2022b 2022c 2023: days
#
# The graders' calls, with checkpoints/ beside this file or else the weights that come with it:
#
#   bash run_all.sh p1 OUT                   1000 faces                   hw2_p1.sh of 2021, hw2_1.sh of 2022
#   bash run_all.sh acgan OUT                0_001.png ... 9_100.png      hw2_p2.sh of 2021
#   bash run_all.sh p2 OUT                   0_001.png ... 9_100.png      hw2_2.sh of 2022, hw2_1.sh of 2023
#   bash run_all.sh p3 NOISE OUT UNET        NN.png for every NN.pt       hw2_2.sh of 2023
#   bash run_all.sh p4 IMAGES OUT.csv        image_name,label             hw2_3.sh of 2022 and 2023
#   bash run_all.sh p4 IMAGES TARGET OUT.csv the same with dann           hw2_p3.sh of 2021, SVHN from USPS
#   bash run_all.sh bonus IMAGES TARGET OUT.csv   with dann-mt            hw2_bonus.sh of 2021
set -euo pipefail
here=$(CDPATH="" cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd)
usage() { sed -n '2,19s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
absolute() { case $1 in /*) printf %s "$1" ;; *) printf %s "$PWD/$1" ;; esac; }
call() {  # a script on paths that are absolute, from this folder, where it finds checkpoints/ and .weights/
  cd "$here" && exec python3 "$@"
}
bonus() {  # IMAGES TARGET OUT.csv, more options
  local source=()
  if [ "$2" = svhn ]; then source=(--source usps); fi
  call p4_dann.py --mode predict --input "$(absolute "$1")" --target "$2" --out "$(absolute "$3")" \
    ${source[@]+"${source[@]}"} "${@:4}"
}

for argument in "$@"; do
  [ -n "$argument" ] || { echo "error: an argument is empty" >&2; usage; }
done
case "$#:${1-}" in
  2:p1) call p1_gan.py --mode sample --out "$(absolute "$2")" ;;
  2:acgan) call p1_gan.py --mode sample --method acgan --out "$(absolute "$2")" ;;
  2:p2) call p2_diffusion.py --mode sample --out "$(absolute "$2")" ;;
  4:p3) call p3_ddim.py --mode sample --noise "$(absolute "$2")" --out "$(absolute "$3")" --ckpt "$(absolute "$4")" ;;
  3:p4) call p4_dann.py --mode predict --input "$(absolute "$2")" --out "$(absolute "$3")" ;;
  4:p4) bonus "${@:2}" --method dann ;;
  4:bonus) bonus "${@:2}" ;;
  0:) in=; out=results; train=; full=; problems=(p1 p2 p3 p4) ;;
  1:--train) in=; out=results-train; train=yes; full=; problems=(p1 p2 p3 p4) ;;
  *) full=
     if [ "$1" = --full ]; then full=yes; shift; fi
     [ $# -ge 2 ] || usage
     [ -d "$1" ] || { echo "error: $1: no such folder" >&2; usage; }
     in=$1; out=$2; train=yes; shift 2; problems=("$@"); [ $# -gt 0 ] || problems=(p1 p2 p3 p4) ;;
esac

names=(2021 2022a 2022b 2022c 2023)  # of the reports
if [ "${problems[0]}" = reports ]; then  # alone: what follows are names
  if [ ${#problems[@]} -gt 1 ]; then names=("${problems[@]:1}"); fi
  for name in "${names[@]}"; do
    case $name in 2021|2022a|2022b|2022c|2023) ;; *) usage ;; esac
  done
  problems=(reports); full=yes
fi
for problem in "${problems[@]}"; do
  case ${#problems[@]}:$problem in *:p[1-4]|1:reports) ;; *) usage ;; esac
done
domains_of() { case $1 in p1|p2) echo mnistm ;; p4|reports) echo mnistm svhn usps ;; esac; }
digits() {  # stops here, not after hours, if --data lacks one of these domains
  PYTHONPATH=$here python3 - "$in" "$@" <<'PYTHON'
import sys
import common

try:
    for domain in dict.fromkeys(sys.argv[2:]):
        for split in ("train", "val"):
            common.load_digits(sys.argv[1], domain, split)
except (ValueError, OSError) as e:
    print(f"error: {e}", file=sys.stderr)
    raise SystemExit(2)
PYTHON
}
data=(); built_in=(--built-in p4); faces=yes
if [ -n "$train" ]; then built_in=(--built-in p1 p2 p3 p4); fi
if [ -n "$in" ]; then
  data=(--data "$in"); built_in=()
  digits $(for problem in "${problems[@]}"; do domains_of "$problem"; done)
  if ! [ -d "$in/face/train" ]; then
    faces=
    echo "$in/face/train: no such folder; the parts that learn from faces are left out"
  fi
fi
mkdir -p "$out"

child=; planning=
stop() {  # SIGNAL, CODE: passes it on to the script that runs, and waits until that has saved
  trap '' INT TERM HUP
  if [ -n "$child" ]; then
    if [ "$1" != INT ]; then kill -s "$1" "$child" || true; fi  # Ctrl-C has reached it already
    wait "$child" || true
  fi
  exit "$2"
}
trap 'stop INT 130' INT
trap 'stop TERM 143' TERM
trap 'stop HUP 129' HUP

run() {  # a script with its options, and its time for the report; where it only plans, prints them
  if [ -n "$planning" ]; then printf '%q ' "$@"; echo; return; fi
  local start=$SECONDS code=0
  echo "+ $*"
  (trap - INT; exec python3 "$here/$1" "${@:2}") &  # bash takes no signal while it runs a command itself
  child=$!
  wait "$child" || code=$?
  child=
  printf '%s\t%s\n' "$((SECONDS - start))" "python3 $*" >> "$out/commands.tsv"
  if [ $code -ne 0 ]; then
    report > /dev/null || true  # of what there is
    exit $code
  fi
}
report() { python3 "$here/common.py" report "$out" ${built_in[@]+"${built_in[@]}"}; }
short() { if [ -z "$in" ]; then echo "$*"; fi; }  # options of the runs on built-in data
fast() { if [ -z "$full" ]; then echo "$*"; fi; }  # options of all but the day
weights() {  # NAME, script, options of training: trains $out/NAME.pt, or takes the weights that come with it
  ckpt=$here/.weights/$1.pt
  if [ -z "$train" ]; then [ -e "$ckpt" ]; return; fi
  ckpt=$out/$1.pt
  local resume=()
  if [ -e "$ckpt" ]; then resume=(--resume); fi
  run "$2" --mode train $(fast --fast) --ckpt "$ckpt" ${data[@]+"${data[@]}"} "${@:3}" \
    ${resume[@]+"${resume[@]}"}
}
evaluate() {  # script, folder, more options
  if [ -n "$in" ]; then run "$1" --mode eval --input "$2" --out "$2.json" --data "$in" "${@:3}"; fi
}

p1() {
  local grids=()
  for method in ${faces:+${full:+dcgan wgangp} sngan} acgan; do
    weights "p1_$method" p1_gan.py --method "$method" || continue
    run p1_gan.py --mode sample --ckpt "$ckpt" --out "$out/p1_$method"
    evaluate p1_gan.py "$out/p1_$method" --ckpt "$ckpt"
    if [ -z "$in" ] && [ "$method" = acgan ]; then
      run p1_gan.py --mode eval --input "$out/p1_acgan" --out "$out/p1_acgan.json" --ckpt "$ckpt"
    fi
    if [ "$method" != wgangp ]; then grids+=("$ckpt"); fi  # compare.png: A and B
  done
  if [ ${#grids[@]} -gt 0 ]; then run p1_gan.py --mode grid --ckpt "${grids[@]}" --out "$out/p1_figures"; fi
}
p2() {
  weights p2_diffusion p2_diffusion.py || return 0
  local how=(--ckpt "$ckpt")
  if [ -n "$train" ] && [ -z "$full" ]; then how+=(--guidance 3); fi  # young networks need more
  run p2_diffusion.py --mode sample "${how[@]}" --out "$out/p2_diffusion"
  local scored=(--mode eval --ckpt "$ckpt" --input "$out/p2_diffusion" --out "$out/p2_diffusion.json")
  run p2_diffusion.py "${scored[@]}" ${data[@]+"${data[@]}"}
  run p2_diffusion.py --mode grid "${how[@]}" ${data[@]+"${data[@]}"} $(short --num 5) --out "$out/p2_figures"
}
p3() {
  local given=() sampler=() train=$train
  if [ -n "$in" ] && [ -z "$full" ]; then
    train=  # it takes 13 hours
    echo "p3: faces by the weights that come with it"
  fi
  if [ -n "$in" ] && [ -e "$in/face/UNet.pt" ]; then  # the course's network and noises of 2023
    given=(--ckpt "$in/face/UNet.pt" --noise "$in/face/noise")
    run p3_ddim.py --mode sample "${given[@]}" --out "$out/p3_given"
    if [ -d "$in/face/GT" ]; then
      run p3_ddim.py --mode mse --input "$out/p3_given" --gt "$in/face/GT" --out "$out/p3_given.json"
    fi
    if [ -z "$full" ]; then given=(); fi  # a figure of it takes longer than the hour
  fi
  if [ $faces ] && weights p3_ddim p3_ddim.py $(short --steps 400); then
    local how=(--sampler dpm++ --ckpt "$ckpt")
    if [ -z "$train" ]; then how+=(--guide "$here/.weights/p3_guide.pt"); fi
    run p3_ddim.py --mode sample "${how[@]}" $(fast --num 64 --sample-steps 8) --out "$out/p3_faces"
    if [ -n "$full" ]; then evaluate p3_ddim.py "$out/p3_faces"; fi
    run p3_ddim.py --mode grid "${how[@]}" --out "$out/p3_figures"
    run p3_ddim.py --mode invert --ckpt "$ckpt" ${data[@]+"${data[@]}"} $(fast --sample-steps 10 --num 4) \
      --out "$out/p3_figures"
    if [ ${#given[@]} -eq 0 ]; then
      given=(--ckpt "$ckpt")
      sampler=(--sampler dpm++)
    fi
  fi
  [ ${#given[@]} -gt 0 ] || return 0
  run p3_ddim.py --mode eta-grid "${given[@]}" $(fast --sample-steps 20 --eta 0 0.5 1) \
    --out "$out/p3_figures"
  run p3_ddim.py --mode interpolate "${given[@]}" ${sampler[@]+"${sampler[@]}"} --out "$out/p3_figures"
}
p4() {
  local targets=(svhn usps) options=(--seeds 0 --methods dann dann-mt)
  if [ -n "$full" ]; then
    options=(--seeds 0)
  elif [ -n "$in" ]; then
    options+=(--scenarios mnistm-svhn mnistm-usps svhn-mnistm usps-svhn)  # what the course grades
  else
    targets=(svhn)
    options=(--seeds 0 --methods dann-mt --scenarios mnistm-svhn --steps 240)
  fi
  run p4_dann.py --mode table "${options[@]}" $(fast --fast) ${data[@]+"${data[@]}"} \
    --ckpt "$out" --out "$out/p4_table"
  for target in "${targets[@]}"; do
    run p4_dann.py --mode tsne --ckpt "$out/p4_dann-mt_mnistm_${target}_deep_0.pt" --out "$out/p4_figures" \
      $(short --num 500) \
      ${data[@]+"${data[@]}"}
  done
}
reports() {
  local name method methods states seeds path
  for name in "${names[@]}"; do
    methods=(dcgan wgangp); states=(); seeds=(0 1 2)
    case $name in
      2021) methods=(dcgan acgan); seeds=(0) ;;
      2022b) methods=(dcgan sngan); states=(--states 0 40 80 120 160 200) ;;
      2022c) states=(--states 1 50 100 200 400 600 800 1000) ;;
      2023) methods=(); states=(--states 1 101 201 261 361 400); seeds=(0) ;;
    esac
    for method in ${methods[@]+"${methods[@]}"}; do
      if [ -z "$faces" ] && [ "$method" != acgan ]; then continue; fi
      weights "p1_${method}_$name" p1_gan.py --report "$name" --method "$method"
      run p1_gan.py --mode sample --ckpt "$ckpt" --out "$out/p1_${method}_$name"
      evaluate p1_gan.py "$out/p1_${method}_$name" --ckpt "$ckpt"
      run p1_gan.py --mode grid --ckpt "$ckpt" --out "$out/p1_figures_$name"
    done
    if [ "$name" != 2021 ]; then
      weights "p2_diffusion_$name" p2_diffusion.py --report "$name"
      run p2_diffusion.py --mode sample --report "$name" --ckpt "$ckpt" --out "$out/p2_report_$name"
      evaluate p2_diffusion.py "$out/p2_report_$name" --ckpt "$ckpt"
      run p2_diffusion.py --mode grid --report "$name" --ckpt "$ckpt" --data "$in" \
        ${states[@]+"${states[@]}"} --out "$out/p2_figures_$name"
    fi
    if [ "$name" = 2023 ] && [ -e "$in/face/UNet.pt" ]; then
      local given=(--ckpt "$in/face/UNet.pt" --noise "$in/face/noise")
      run p3_ddim.py --mode eta-grid "${given[@]}" --eta 0 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9 \
        --out "$out/p3_figures_2023"
      run p3_ddim.py --mode eta-grid "${given[@]}" --eta 0.5 0.5 --out "$out/p3_figures_2023_eta"
      run p3_ddim.py --mode interpolate "${given[@]}" --out "$out/p3_figures_2023"
    fi
    run p4_dann.py --mode table --report "$name" --seeds "${seeds[@]}" --ckpt "$out" --data "$in" \
      --out "$out/p4_table_$name"
    for path in "$out"/p4_dann_*_"$name"-*_0.pt; do
      run p4_dann.py --mode tsne --ckpt "$path" --data "$in" --out "$out/p4_figures_$name"
    done
  done
}

if [ "${problems[0]}" = reports ]; then
  python3 "$here/tests/benchmark.py" cost < <(planning=yes; reports) || true  # says its own error
fi
for problem in "${problems[@]}"; do
  $problem
done
report
