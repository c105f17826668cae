#!/usr/bin/env bash
# What needs a GPU, in parts of at most ten minutes each:
#   benchmarks/gpu.sh tests|throughput|race OUT_FOLDER [flags]
# Flags name data and feature extractor where these are not to be had from the Hub, for example
#   --dataset_name ../data/cifar10 --eval_feature_extractor ../metrics/cifar10-regnet
set -euo pipefail
part=$1 out=$2
shift 2
mkdir -p "$out"
recipe="--config configs/cifar10.yaml --mixed_precision bf16"
case $part in
tests) python -m pytest -q tests -k "cuda or synchronisation or waits" ;;
throughput)
  python benchmarks/throughput.py $recipe --output_json "$out/throughput_eager.json" "$@"
  python benchmarks/throughput.py $recipe --compile --output_json "$out/throughput_compiled.json" "$@"
  ;;
race) # begins no run after seven minutes; the same command goes on with those that are left
  python compare.py --config configs/races/strongest/cifar10.yaml --seeds 1030 --stop_after 420 --output_dir "$out" "$@"
  ;;
*)
  echo "unknown part '$part': tests, throughput or race" >&2
  exit 2
  ;;
esac
