#!/usr/bin/env bash
# The trials of docs/results.md, one after the other: benchmarks/trials.sh CIFAR10 CLOTHING OUT
# CIFAR10 and CLOTHING are folders train/CLASS/IMAGE and test/CLASS/IMAGE; of CIFAR-10, the trials read the first 1,000 training
# images of each class in the order of their names. Each run resumes where it stopped; every run takes one core.
set -euo pipefail
cifar10=$(realpath "$1") clothing=$(realpath "$2") out=$3
here=$(cd "$(dirname "$0")" && pwd)
export OMP_NUM_THREADS=1

part=$out/cifar10-part
if [ ! -d "$part" ]; then
  mkdir -p "$part/train"
  ln -s "$cifar10/test" "$part/test"
  for class in "$cifar10"/train/*/; do
    mkdir "$part/train/$(basename "$class")"
    find "$class" -type f | sort | head -1000 | xargs ln -s -t "$part/train/$(basename "$class")"
  done
fi

run() {
  name=$1 && shift
  [ -f "$out/$name/summary.json" ] || dmjd pretrain --config "$here/small.yaml" --out "$out/$name" --resume "$@"
}
cifar=(--data "$part" --model.image_size 32 --model.patch_size 4)
clothes=(--data "$clothing" --model.image_size 96 --model.patch_size 12)
run cifar10-mae --preset mae "${cifar[@]}" --epochs 16
run cifar10-dm --preset dm "${cifar[@]}" --epochs 8
run cifar10-dmjd --preset dmjd "${cifar[@]}" --epochs 8
run clothing-mae --preset mae "${clothes[@]}" --epochs 40
run clothing-dm --preset dm "${clothes[@]}" --epochs 20
run clothing-dmjd --preset dmjd "${clothes[@]}" --epochs 20
run cifar10-hybrid --preset dmjd --model.backbone convvit --decoder.mlp_ratio 8 "${cifar[@]}" --epochs 4
