#!/usr/bin/env bash
# Does it learn? speech_tiny on spoken digits and read sentences, three seeds and a control whose targets are shuffled; what the frozen
# features know of the digits goes into one JSON, with the validation curves.
#
#   benchmarks/digits.sh SPEECH WORK RESULT.json [STEPS]
#
# SPEECH  a folder with fsdd/<digit>/<digit>_<speaker>_<take>.wav (8 kHz; takes 0 to 4 are held out) and librispeech_140spk/*.flac (its
#         metadata.tsv says which are held out); ../shared/data/speech was used for benchmarks/results/digits.json
# Seed 1 runs on two processes under ZeRO-3, the others on one each under ZeRO-1: a run is a pure function of its seed, not of its layout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
speech=$(realpath "$1") work=$2 result=$3 steps=${4:-1000}
mkdir -p "$work"
if [ ! -f "$work/shards/valid/dataset.json" ]; then
  rm -rf "$work/raw"
  for file in "$speech"/fsdd/*/*.wav; do
    digit=$(basename "$(dirname "$file")") take=${file##*_}
    if [ "${take%.wav}" -lt 5 ]; then parts="test/$digit valid/fsdd"; else parts="train/$digit pretrain/fsdd"; fi
    for part in $parts; do mkdir -p "$work/raw/$part" && ln -s "$file" "$work/raw/$part/"; done
  done
  mkdir -p "$work"/raw/{pretrain,valid}/librispeech
  tail -n +2 "$speech/librispeech_140spk/metadata.tsv" | while IFS=$'\t' read -r path _ _ _ split; do
    ln -s "$speech/librispeech_140spk/$path" "$work/raw/$([ "$split" = test ] && echo valid || echo pretrain)/librispeech/"
  done
  python tools/make_shards.py speech --input "$work/raw/train" --output "$work/shards/train" --overwrite
  python tools/make_shards.py speech --input "$work/raw/test" --output "$work/shards/test" --classes "$work/shards/train" --overwrite
  for part in pretrain valid; do
    python tools/make_shards.py speech --input "$work/raw/$part" --output "$work/shards/$part" --labels none --overwrite
  done
fi

pretrain() { # name, seed, DeepSpeed JSON, launcher, flags
  local name=$1 seed=$2 layout=$3 start=$4
  shift 4
  $start launch/pretrain.py --deepspeed "ds_configs/$layout.json" --config speech_tiny \
    --data.shards "$work/shards/pretrain" --data.valid "$work/shards/valid" --train.output_dir "$work/$name" \
    --train.steps "$steps" --train.eval_every 100 --train.save_every 500 --train.log_every 20 --train.seed "$seed" "$@" \
    >"$work/$name.log" 2>&1
  python tools/probe.py --checkpoint "$work/$name" --train "$work/shards/train" --test "$work/shards/test" \
    --output "$work/$name-probe.json"
}

export OMP_NUM_THREADS=1
pretrain seed1 1 zero3 "deepspeed --num_gpus 2 --master_port 29621"
pretrain seed2 2 zero1 python &
other=$!
pretrain seed3 3 zero1 python
wait "$other"
pretrain shuffled 1 zero1 python --targets.shuffle true
python benchmarks/gather.py "$work" "$result" benchmarks/digits.sh seed1 seed2 seed3 shuffled
