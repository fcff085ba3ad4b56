"""From a checkpoint to what others load, and a certificate that both compute the same. No DeepSpeed, one process."""
