"""The exponential moving average of the student, kept in float32 shards."""
