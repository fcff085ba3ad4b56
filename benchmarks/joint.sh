#!/usr/bin/env bash
# Does it learn? joint_tiny on photos, speech and novels, all three in one run on two processes under ZeRO-3; and beside it the same number
# of updates of each modality in a run of its own (the same recipe with the other weights 0, so nothing differs but the company). The
# validation curves go into one JSON.
#
#   benchmarks/joint.sh DATA WORK RESULT.json [STEPS]
#
# DATA   a folder with image/clothing/{train,test}, speech/{fsdd,librispeech_140spk}, text/books and text/banking77; ../shared/data was
#        used for benchmarks/results/joint.json
# STEPS  of the joint run, 3,000 if not given; each of the others has a third
# The three run on one process each: a run is a pure function of its seed, not of its layout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
data=$(realpath "$1") work=$2 result=$3 steps=${4:-3000}
export OMP_NUM_THREADS=1
mkdir -p "$work"
for part in train test; do
  [ -f "$work/image/$part/dataset.json" ] ||
    python tools/make_shards.py image --input "$data/image/clothing/$part" --output "$work/image/$part"
done
if [ ! -f "$work/speech/valid/dataset.json" ]; then # takes 0 to 4 of the digits are held out, and the sentences that metadata.tsv says
  rm -rf "$work/raw-speech"
  mkdir -p "$work"/raw-speech/{train,valid}/{fsdd,librispeech}
  for file in "$data"/speech/fsdd/*/*.wav; do
    take=${file##*_}
    ln -s "$file" "$work/raw-speech/$([ "${take%.wav}" -lt 5 ] && echo valid || echo train)/fsdd/"
  done
  tail -n +2 "$data/speech/librispeech_140spk/metadata.tsv" | while IFS=$'\t' read -r path _ _ _ split; do
    ln -s "$data/speech/librispeech_140spk/$path" "$work/raw-speech/$([ "$split" = test ] && echo valid || echo train)/librispeech/"
  done
  for part in train valid; do
    python tools/make_shards.py speech --input "$work/raw-speech/$part" --output "$work/speech/$part" --labels none --overwrite
  done
fi
if [ ! -f "$work/digits/test/dataset.json" ]; then
  rm -rf "$work/raw-digits"
  for file in "$data"/speech/fsdd/*/*.wav; do
    digit=$(basename "$(dirname "$file")") take=${file##*_}
    part=$([ "${take%.wav}" -lt 5 ] && echo test || echo train)
    mkdir -p "$work/raw-digits/$part/$digit" && ln -s "$file" "$work/raw-digits/$part/$digit/"
  done
  python tools/make_shards.py speech --input "$work/raw-digits/train" --output "$work/digits/train" --overwrite
  python tools/make_shards.py speech --input "$work/raw-digits/test" --output "$work/digits/test" --classes "$work/digits/train" --overwrite
fi
if [ ! -f "$work/text/valid/dataset.json" ]; then # the last tenth of each novel is held out
  rm -rf "$work/raw-text"
  mkdir -p "$work"/raw-text/{train,valid}
  for book in "$data"/text/books/*.txt; do
    lines=$(wc -l <"$book")
    head -n $((lines * 9 / 10)) "$book" >"$work/raw-text/train/$(basename "$book")"
    tail -n +$((lines * 9 / 10 + 1)) "$book" >"$work/raw-text/valid/$(basename "$book")"
  done
  python tools/train_tokenizer.py --input "$work/raw-text/train" --vocab-size 4000 --output "$work/tokenizer" --overwrite
  for part in train valid; do
    python tools/make_shards.py text --input "$work/raw-text/$part" --tokenizer "$work/tokenizer" --sentence paragraph --clean \
      --output "$work/text/$part" --overwrite
  done
fi

if [ ! -f "$work/banking77/test/dataset.json" ]; then
  python tools/make_shards.py text --input "$data/text/banking77/train.tsv" --tokenizer "$work/tokenizer" --output "$work/banking77/train" --overwrite
  python tools/make_shards.py text --input "$data/text/banking77/test.tsv" --tokenizer "$work/tokenizer" --output "$work/banking77/test" \
    --classes "$work/banking77/train" --overwrite
fi
declare -A labelled=([vision]=image [speech]=digits [text]=banking77)

probe() { # name of the run, modality
  python tools/probe.py --checkpoint "$work/$1" --modality "$2" --train "$work/${labelled[$2]}/train" --test "$work/${labelled[$2]}/test" \
    --output "$work/$1-$2.json"
}

pretrain() { # name, DeepSpeed JSON, steps, launcher, flags
  local name=$1 layout=$2 steps=$3 start=$4
  shift 4
  $start launch/pretrain.py --deepspeed "ds_configs/$layout.json" --config joint_tiny --train.output_dir "$work/$name" \
    --data.shards "{vision: $work/image/train, speech: $work/speech/train, text: $work/text/train}" \
    --data.valid "{vision: $work/image/test, speech: $work/speech/valid, text: $work/text/valid}" \
    --train.steps "$steps" --schedule.warmup_steps $((steps / 10)) --train.eval_every $((steps / 10)) --train.log_every 20 "$@" \
    >"$work/$name.log" 2>&1
}

pretrain joint zero3 "$steps" "deepspeed --num_gpus 2 --master_port 29641"
for modality in vision speech text; do
  others=()
  for other in vision speech text; do
    [ "$other" = "$modality" ] || others+=("--joint.$other.weight" 0)
  done
  pretrain "$modality" zero1 $((steps / 3)) python "${others[@]}"
  probe joint "$modality"
  probe "$modality" "$modality"
done
python benchmarks/gather.py "$work" "$result" benchmarks/joint.sh joint vision speech text
