"""Configuration: schema, loading, recipes, and the DeepSpeed JSON that is filled from them."""
