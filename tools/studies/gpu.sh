#!/usr/bin/env bash
# Everything to run on a machine with one GPU, without a network: correctness, the evidence study, speed.
#
#   bash tools/studies/gpu.sh checks    # kernels and loops agree, vmapped runs are runs, bfloat16
#   bash tools/studies/gpu.sh study     # python -m tools.studies.evidence --size=$SIZE, stops after 8 minutes
#   bash tools/studies/gpu.sh speed     # training and sampling beside SiT and PyTorch
#
# No part has seen a GPU yet; each is meant to take less than 10 minutes.
# Records go to OUT (by default gpu_records). SIZE: of the study, gpu (the default) or gpu_cifar10. DATA: where CIFAR-10
# lies, or Fashion-MNIST, which the checks always read. SMALL=yes: small numbers, on any machine.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${OUT:-gpu_records} python=${PYTHON:-python3} part=${1:-}
export PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_MEM_FRACTION=.85

if [ -n "${SMALL:-}" ]; then
  platform=cpu compare=(--config.model.size=S --config.model.depth=2 --config.batch_size=8 --rounds=1 --steps=1)
  study=(--size=small)
  sample=(--config.model.size=S --config.model.depth=2 --config.sampler.steps=2 --config.sampler.batch_size=4 --rounds=1)
else
  platform=gpu compare=(--rounds=3 --vs=torch) study=(--size="${SIZE:-gpu}" --minutes=8)
  sample=(--config.sampler.steps=50 --config.sampler.batch_size=64 --rounds=2)
fi
case $part in checks | study | speed) mkdir -p "$out" ;; esac
here() { echo "=== $* ($(date +%T))"; }

case $part in
  checks)
    here checks
    [ -n "${SMALL:-}" ] || nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv | tee "$out/machine.csv"
    "$python" -m tools.studies.gpu_checks "$out/checks.json" ${SMALL:+--small} ${DATA:+--data_dir="$DATA"}
    ;;
  study)
    here study
    "$python" -m tools.studies.evidence --out="$out/evidence" --states=false "${study[@]}" ${DATA:+--data_dir="$DATA"}
    ;;
  speed)
    here "a training step of B/2 beside SiT, other forms, and PyTorch"
    "$python" -m tools.benchmark train --config=configs/diversedit.py:b2 --platform=$platform "${compare[@]}" \
      --compare=config=configs/sit.py:b2 --compare=model.unroll=True --compare=model.attention=xla --out="$out/train_b2.json"
    here "a training step of XL/2, 64 examples, beside SiT and PyTorch"
    "$python" -m tools.benchmark train --config=configs/sit.py:xl2 --platform=$platform --config.batch_size=64 "${compare[@]}" \
      --compare="config=configs/diversedit.py:xl2 losses.diversity.groups=2" --out="$out/train_xl2.json"
    here "samples of XL/2 with guidance in [0, 0.7]"
    "$python" -m tools.benchmark sample --config=configs/diversedit.py:xl2 --platform=$platform --config.sampler.cfg_scale=1.8 \
      --config.sampler.guidance_interval="(0,0.7)" "${sample[@]}" --out="$out/sample_xl2.json"
    ;;
  *)
    sed -n '2,11s/^# \{0,1\}//p' "$0"
    exit 64
    ;;
esac
here "done: $out"
