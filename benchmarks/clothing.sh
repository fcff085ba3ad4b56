#!/usr/bin/env bash
# Does it learn? vision_tiny on a folder of real photos (train/<class>/*.jpg, test/<class>/*.jpg), three seeds and a control whose
# targets are shuffled; validation curves and probes are gathered into one JSON.
#
#   benchmarks/clothing.sh PHOTOS WORK RESULT.json [STEPS]
#
# PHOTOS  ../shared/data/image/clothing was used for benchmarks/results/clothing.json
# Needs two processes' worth of CPU for seed 1 (ZeRO-3 over two ranks); the other runs take one process each (ZeRO-1). A run is a pure
# function of its seed, not of its layout, so this only saves time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
photos=$1 work=$2 result=$3 steps=${4:-1500}
mkdir -p "$work"
for part in train test; do
  [ -f "$work/shards/$part/dataset.json" ] ||
    python tools/make_shards.py image --input "$photos/$part" --output "$work/shards/$part"
done

pretrain() { # name, seed, launcher words --, flags
  local name=$1 seed=$2 layout=$3 start=$4
  shift 4
  $start launch/pretrain.py --deepspeed "ds_configs/$layout.json" --config vision_tiny \
    --data.shards "$work/shards/train" --data.valid "$work/shards/test" --train.output_dir "$work/$name" \
    --train.steps "$steps" --train.eval_every 250 --train.save_every 500 --train.log_every 20 --train.seed "$seed" "$@" \
    >"$work/$name.log" 2>&1
  python tools/probe.py --checkpoint "$work/$name" --train "$work/shards/train" --test "$work/shards/test" \
    --output "$work/$name-probe.json"
}

pretrain seed1 1 zero3 "deepspeed --num_gpus 2 --master_port 29611"
export OMP_NUM_THREADS=1 # the rest one process each, two at a time
pretrain seed2 2 zero1 python &
other=$!
pretrain seed3 3 zero1 python
wait "$other"
pretrain shuffled 1 zero1 python --targets.shuffle true
python benchmarks/gather.py "$work" "$result" benchmarks/clothing.sh seed1 seed2 seed3 shuffled
