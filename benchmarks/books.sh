#!/usr/bin/env bash
# Does it learn? text_tiny on novels, of each of which the last tenth is held out, on two processes under ZeRO-3, and a control whose
# targets are shuffled. What frozen features know of two sets of labelled sentences, what fine-tuning makes of them (three seeds, against
# random weights), and what counting words comes to, go into one JSON with the validation curves.
#
#   benchmarks/books.sh TEXT WORK RESULT.json [STEPS]
#
# TEXT  a folder with books/*.txt and {banking77,pros_cons}/{train,test}.tsv (columns label, text); ../shared/data/text was used for
#       benchmarks/results/books.json
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
text=$(realpath "$1") work=$2 result=$3 steps=${4:-500}
export OMP_NUM_THREADS=1
declare -A epochs=([banking77]=3 [pros_cons]=1)
mkdir -p "$work"
if [ ! -f "$work/shards/valid/dataset.json" ]; then
  rm -rf "$work/raw"
  mkdir -p "$work"/raw/{train,valid}
  for book in "$text"/books/*.txt; do
    lines=$(wc -l <"$book")
    head -n $((lines * 9 / 10)) "$book" >"$work/raw/train/$(basename "$book")"
    tail -n +$((lines * 9 / 10 + 1)) "$book" >"$work/raw/valid/$(basename "$book")"
  done
  python tools/train_tokenizer.py --input "$work/raw/train" --vocab-size 4000 --output "$work/tokenizer" --overwrite
  for part in train valid; do
    python tools/make_shards.py text --input "$work/raw/$part" --tokenizer "$work/tokenizer" --sentence paragraph --clean \
      --output "$work/shards/$part" --overwrite
  done
fi
for task in "${!epochs[@]}"; do
  if [ ! -f "$work/$task/test/dataset.json" ]; then
    python tools/make_shards.py text --input "$text/$task/train.tsv" --tokenizer "$work/tokenizer" --output "$work/$task/train" --overwrite
    python tools/make_shards.py text --input "$text/$task/test.tsv" --tokenizer "$work/tokenizer" --output "$work/$task/test" \
      --classes "$work/$task/train" --overwrite
  fi
  python benchmarks/bag_of_words.py "$text/$task/train.tsv" "$text/$task/test.tsv" "$work/reference-$task.json"
done

pretrain() { # name, flags
  local name=$1
  shift
  deepspeed --num_gpus 2 --master_port 29631 launch/pretrain.py --deepspeed ds_configs/zero3.json --config text_tiny \
    --data.shards "$work/shards/train" --data.valid "$work/shards/valid" --train.output_dir "$work/$name" --train.steps "$steps" \
    --schedule.warmup_steps $((steps / 10)) --train.eval_every 100 --train.save_every 500 --train.log_every 20 "$@" >"$work/$name.log" 2>&1
  for task in "${!epochs[@]}"; do
    python tools/probe.py --checkpoint "$work/$name" --train "$work/$task/train" --test "$work/$task/test" --output "$work/$name-$task.json"
  done
}

pretrain seed1
pretrain shuffled --targets.shuffle true
for task in "${!epochs[@]}"; do
  python tools/probe.py --checkpoint "$work/seed1" --train "$work/$task/train" --test "$work/$task/test" --fine-tune \
    --weights random student --epochs "${epochs[$task]}" --output "$work/seed1-$task-fine-tuned.json"
done
python benchmarks/gather.py "$work" "$result" benchmarks/books.sh seed1 shuffled
