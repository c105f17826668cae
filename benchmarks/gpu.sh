#!/usr/bin/env bash
# What needs a GPU, in parts of at most ten minutes each:
#   benchmarks/gpu.sh tests|throughput|comparison OUT_FOLDER [training flags]
# Training flags name data and feature extractor where these are not to be had from the Hub, for example
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
comparison) # two runs of 200 s, and their scores, fit into ten minutes; give other --methods and --seeds in turn
  python compare.py $recipe --compile --logger none --eval_batch_size 0 --lr_warmup_steps 500 --max_train_seconds 200 \
    --score_at 0.25 0.5 1 --eval_num_images 5000 --eval_num_inference_steps 100 --output_dir "$out" "$@"
  ;;
*)
  echo "unknown part '$part': tests, throughput or comparison" >&2
  exit 2
  ;;
esac
