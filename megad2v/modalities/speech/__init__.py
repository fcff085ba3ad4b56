"""16 kHz waveforms: front end, span masks, transforms, shards, key maps."""
