"""Images: front end, block masks, augmentation, shards, Hugging Face key map."""
