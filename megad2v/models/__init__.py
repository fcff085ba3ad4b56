"""What is computed: plain torch modules that know nothing of engines, ranks or files."""
