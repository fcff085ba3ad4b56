# The pretraining that every launcher starts here, sourced by two_nodes.sh and slurm.sh.
#
#   prepare WORK             demo shards, and the reference: two ranks on one node, started by deepspeed
#   flags NAME               the words after launch/pretrain.py, for a run into WORK/NAME
#   compare NAME REFERENCE   a line of the table: are the losses of both runs the same, step by step?

steps=12
failures=0
work=

prepare() {
  work=$1
  export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
  python tools/make_demo_data.py "$work/data" --images-per-class 12 > /dev/null
  python tools/make_shards.py image --input "$work/data/image" --output "$work/shards" --max-shard-size 100KB > /dev/null
}

flags() {
  words=(--deepspeed ds_configs/zero3.json --config vision_tiny --data.shards "$work/shards" --data.workers 1
    --model.width 32 --model.depth 2 --model.heads 2 --targets.layers 2 --vision.image_size 32
    --data.micro_batch.samples 4 --train.micro_batches_per_step 4 --train.steps $steps --train.log_every 1
    --train.tensorboard false --train.rendezvous_timeout 60 --train.output_dir "$work/$1")
}

run() { # name, then a command or function with a time limit of its own; its output goes to WORK/name.log, and is shown when it fails
  local name=$1 begin=$SECONDS
  shift
  if ! "$@" > "$work/$name.log" 2>&1; then
    echo "$name: FAILED: $*"
    tail -40 "$work/$name.log"
    failures=$((failures + 1))
  fi
  seconds=$((SECONDS - begin))
}

compare() {
  python - "$work/$1/metrics.jsonl" "$work/$2/metrics.jsonl" "$1" "$2" "$steps" "$seconds" << 'EOF' || failures=$((failures + 1))
import json, pathlib, sys

def losses(path):
    path = pathlib.Path(path)
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else []
    return {line["step"]: line["loss"] for line in lines if "loss" in line}

mine, reference = losses(sys.argv[1]), losses(sys.argv[2])
name, against, steps, seconds = sys.argv[3], sys.argv[4], int(sys.argv[5]), sys.argv[6]
whole = sorted(mine) == sorted(reference) == list(range(1, steps + 1))
worst = max((abs(mine[k] - reference[k]) / abs(reference[k]) for k in mine if k in reference), default=float("nan"))
verdict = "equal to the bit" if mine == reference else f"differs by {worst:.1e}"
good = whole and worst <= 1e-6
if not whole:
    verdict += f", steps {sorted(mine)}"
ends = f"{mine[1]:.9g} .. {mine[steps]:.9g}" if good else "-"
print(f"{name:26} {against:20} {len(mine):5}  {ends:28} {seconds:>4} s  {verdict}{'' if good else '  FAILED'}", flush=True)
sys.exit(not good)
EOF
}

header() { printf '%-26s %-20s %5s  %-28s %6s  %s\n' started compared steps 'loss, first .. last' took verdict; }
