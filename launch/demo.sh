#!/usr/bin/env bash
# The whole path on a machine with two cores and no GPU, for images, speech and text, and for all three in one run: generated corpus ->
# shards -> pretraining on two processes under ZeRO-3 with a sharded teacher -> Hugging Face. `make demo` calls it with .venv/bin first in PATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=runs/demo
steps=${DEMO_STEPS:-150}
images=${DEMO_IMAGES_PER_CLASS:-250}
clips=${DEMO_CLIPS_PER_SPEAKER:-15}
stories=${DEMO_STORIES:-2000}
# Two processes; on a machine with a single GPU one.
ranks=$(python -c 'import torch; print(1 if torch.cuda.device_count() == 1 else 2)')
begin=$SECONDS
say() { printf '\n== %s\n' "$*"; }

say "images, speech and stories (generated, no download), and their shards"
for part in train valid; do
  case $part in
    train) size=(--images-per-class "$images" --clips-per-speaker "$clips" --stories "$stories" --seed 1) ;;
    valid) size=(--images-per-class $((images / 5)) --clips-per-speaker $((clips / 5 + 1)) --stories $((stories / 10)) --seed 2) ;;
  esac
  for corpus in image speech text; do
    if [ ! -f "$out/shards/$corpus/$part/dataset.json" ]; then
      python tools/make_demo_data.py "$out/data-$part" --only "$corpus" "${size[@]}" --overwrite
      more=()
      if [ "$corpus" = text ]; then
        [ "$part" = valid ] ||
          python tools/train_tokenizer.py --input "$out/data-train/text" --vocab-size 1000 --output "$out/tokenizer" --overwrite
        more=(--tokenizer "$out/tokenizer" --document blank-lines)
      fi
      python tools/make_shards.py "$corpus" --input "$out/data-$part/$corpus" --output "$out/shards/$corpus/$part" --overwrite "${more[@]}"
    fi
  done
done

demo() { # corpus, recipe, steps
  local corpus=$1 recipe=$2 steps=$3
  say "pretraining: $recipe, $steps steps, $ranks processes, ZeRO-3"
  rm -rf "$out/$corpus"
  deepspeed --num_gpus "$ranks" launch/pretrain.py --deepspeed ds_configs/zero3.json --config "$recipe" \
    --data.shards "$out/shards/$corpus/train" --data.valid "$out/shards/$corpus/valid" --train.output_dir "$out/$corpus" \
    --train.steps "$steps" --schedule.warmup_steps $((steps / 5)) --train.eval_every 50 --train.save_every 100

  say "export to Hugging Face, with a certificate that both models compute the same"
  rm -rf "$out/export/hf/$corpus"
  python tools/convert_checkpoint.py --checkpoint "$out/$corpus" --to hf --output "$out/export/hf/$corpus"
}
demo image vision_tiny "$steps"
demo speech speech_tiny $(((steps + 1) / 2))
demo text text_tiny $(((steps + 1) / 2))

joint_steps=$(((steps + 1) / 2))
say "pretraining: joint_tiny, all three in one run, $joint_steps steps, $ranks processes, ZeRO-3"
rm -rf "$out/joint"
deepspeed --num_gpus "$ranks" launch/pretrain.py --deepspeed ds_configs/zero3.json --config joint_tiny \
  --data.shards "{vision: $out/shards/image/train, speech: $out/shards/speech/train, text: $out/shards/text/train}" \
  --data.valid "{vision: $out/shards/image/valid, speech: $out/shards/speech/valid, text: $out/shards/text/valid}" \
  --train.output_dir "$out/joint" --train.steps "$joint_steps" --schedule.warmup_steps $((joint_steps / 5))
for modality in vision speech text; do
  say "export of its $modality model to Hugging Face"
  rm -rf "$out/export/hf/joint-$modality"
  python tools/convert_checkpoint.py --checkpoint "$out/joint" --modality "$modality" --to hf --output "$out/export/hf/joint-$modality"
done

say "the demo took $((SECONDS - begin)) s; it left, of image, speech and text,"
cat <<EOF
  $out/image/metrics.jsonl, tensorboard/   what was learned (tensorboard --logdir $out)
  $out/image/checkpoints/                  student, teacher and optimizer, in flat fragments
  $out/export/hf/image                     AutoModel.from_pretrained("$out/export/hf/image")
  $out/export/hf/speech                    AutoModel.from_pretrained("$out/export/hf/speech")
  $out/export/hf/text                      AutoModel, AutoTokenizer.from_pretrained("$out/export/hf/text")
  $out/joint                               all three in one run (docs/joint.md)
  $out/export/hf/joint-{vision,speech,text}  the models in it, one for each modality
Next:
  python tools/probe.py --checkpoint $out/image --train $out/shards/image/train --test $out/shards/image/valid
  python tools/make_shards.py image --input YOUR/IMAGES --output YOUR/SHARDS
  python tools/make_shards.py speech --input YOUR/RECORDINGS --output YOUR/SHARDS
  python tools/make_shards.py text --input YOUR/TEXTS --tokenizer TOKENIZER --output YOUR/SHARDS
  deepspeed launch/pretrain.py --deepspeed ds_configs/zero3.json --config vision_tiny --data.shards YOUR/SHARDS --train.output_dir runs/mine
  deepspeed launch/pretrain.py --deepspeed ds_configs/zero3.json --config speech_tiny --data.shards YOUR/SHARDS --train.output_dir runs/mine
  deepspeed launch/pretrain.py --deepspeed ds_configs/zero3.json --config text_tiny --data.shards YOUR/SHARDS --train.output_dir runs/mine
  deepspeed launch/pretrain.py --deepspeed ds_configs/zero3.json --config joint_tiny --data.shards '{vision: A, speech: B, text: C}' --train.output_dir runs/mine
  python launch/pretrain.py --help
EOF
