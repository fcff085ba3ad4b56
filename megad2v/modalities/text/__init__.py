"""Text as token ids: vocabularies, shards, generated corpora."""
