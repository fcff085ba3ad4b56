#!/usr/bin/env bash
# The whole path on a machine with two cores and no GPU: generated images -> shards -> pretraining on two processes under
# ZeRO-3 with a sharded teacher -> Hugging Face. `make demo` calls it with .venv/bin first in PATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=runs/demo
steps=${DEMO_STEPS:-150}
images=${DEMO_IMAGES_PER_CLASS:-250}
# Two processes; on a machine with a single GPU one.
ranks=$(python -c 'import torch; print(1 if torch.cuda.device_count() == 1 else 2)')
begin=$SECONDS
say() { printf '\n== %s\n' "$*"; }

if [ ! -f "$out/shards/image/train/dataset.json" ] || [ ! -f "$out/shards/image/valid/dataset.json" ]; then
  say "images (generated, no download) and shards"
  python tools/make_demo_data.py "$out/data" --images-per-class "$images" --overwrite
  python tools/make_demo_data.py "$out/data-valid" --images-per-class $((images / 5)) --seed 2 --overwrite
  python tools/make_shards.py image --input "$out/data/image" --output "$out/shards/image/train" --overwrite
  python tools/make_shards.py image --input "$out/data-valid/image" --output "$out/shards/image/valid" --overwrite
fi

say "pretraining: vision_tiny, $steps steps, $ranks processes, ZeRO-3"
rm -rf "$out/vision"
deepspeed --num_gpus "$ranks" launch/pretrain.py --deepspeed ds_configs/zero3.json --config vision_tiny \
  --data.shards "$out/shards/image/train" --data.valid "$out/shards/image/valid" --train.output_dir "$out/vision" \
  --train.steps "$steps" --train.eval_every 50 --train.save_every 100

say "export to Hugging Face, with a certificate that both models compute the same"
rm -rf "$out/export/hf/image"
python tools/convert_checkpoint.py --checkpoint "$out/vision" --to hf --output "$out/export/hf/image"

say "the demo took $((SECONDS - begin)) s; it left"
cat <<EOF
  $out/vision/metrics.jsonl, tensorboard/   what was learned (tensorboard --logdir $out/vision)
  $out/vision/checkpoints/                  student, teacher and optimizer, in flat fragments
  $out/export/hf/image                      AutoModel.from_pretrained("$out/export/hf/image")
Next:
  python tools/probe.py --checkpoint $out/vision --train $out/shards/image/train --test $out/shards/image/valid
  python tools/make_shards.py image --input YOUR/IMAGES --output YOUR/SHARDS
  deepspeed launch/pretrain.py --deepspeed ds_configs/zero3.json --data.shards YOUR/SHARDS --train.output_dir runs/mine
  python launch/pretrain.py --help
EOF
