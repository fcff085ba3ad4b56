"""How layers are split over ranks: process groups, split layers, collectives with gradients, random numbers."""
