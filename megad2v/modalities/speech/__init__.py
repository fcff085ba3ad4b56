"""Speech: decoding, shards, generated demo speech."""
