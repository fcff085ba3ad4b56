"""Shards, their index, the order of samples, the plan of micro-batches, and the workers that prepare them."""
