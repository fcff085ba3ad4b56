"""megad2v: data2vec pretraining for speech, vision and text at scale."""

__version__ = "0.1.0"
