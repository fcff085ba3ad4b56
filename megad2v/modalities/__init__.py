"""What is particular to a modality, one folder each. `build.py` lists them."""
