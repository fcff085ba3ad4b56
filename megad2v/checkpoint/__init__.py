"""Checkpoints: flat fragments of full tensors, one safetensors file per rank and one checksummed JSON index.

    checkpoints/
      latest                      name of the newest complete checkpoint
      step_00000500/
        index.json                what lies where, lengths and checksums, counters, configuration, code version
        rank00000.safetensors     KIND/NAME@START: elements [START, START + length) of the flattened tensor NAME
        rank00001.safetensors

A fragment says nothing about the layout that wrote it, so any layout reads what it owns by intersecting intervals.
Nothing here is pickled: reading a checkpoint never runs code from it.
"""
