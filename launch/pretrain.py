#!/usr/bin/env python
"""Pretrain a data2vec encoder; start it with `deepspeed launch/pretrain.py --deepspeed ds_configs/zero3.json`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megad2v.training.signals import StopRequests

if __name__ == "__main__":
    requests = StopRequests().listen()  # before torch is imported: that takes seconds, and signals come at any time

    from megad2v.engine.distributed import leave_now
    from megad2v.training.main import main

    leave_now(main(requests=requests))
