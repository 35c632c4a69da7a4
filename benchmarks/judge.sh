#!/usr/bin/env bash
# What a backbone is worth with few and with many labels: benchmarks/judge.sh BACKBONE DATA OUT [FLAGS ...]
# k-NN, linear classifier and fine-tuning with 1 %, 10 % and all labels, of the backbone and of the same network untrained.
# Results go to OUT/{trained,untrained}-VERB[-FRACTION]; the table is `benchmarks/judge_table.py OUT ...`. Runs that are there are not repeated.
set -euo pipefail
backbone=$1 data=$2 out=$3 && shift 3

judge() {
  verb=$1 name=$2 && shift 2
  [ -f "$out/$name/result.json" ] || dmjd "$verb" --backbone "$backbone" --data "$data" --out "$out/$name" "$@"
}
for weights in trained untrained; do
  if [ $weights = trained ]; then which=(); else which=(--untrained); fi
  judge knn $weights-knn "${which[@]}" "$@"
  for fraction in 0.01 0.1 1; do
    judge linear $weights-linear-$fraction --fraction $fraction "${which[@]}" "$@"
  done
done
# As many passes over the images as make the steps of a run comparable: 100 over a hundredth, 30 over a tenth, 10 over all (EPOCHS_OF_ALL).
for fraction in 0.01 0.1 1; do
  case $fraction in 0.01) epochs=100 ;; 0.1) epochs=30 ;; *) epochs=${EPOCHS_OF_ALL:-10} ;; esac
  judge finetune trained-finetune-$fraction --fraction $fraction --epochs $epochs --log.evals 1 --log.saves 4 --resume "$@"
  judge finetune untrained-finetune-$fraction --fraction $fraction --epochs $epochs --log.evals 1 --log.saves 4 --resume --untrained "$@"
done
