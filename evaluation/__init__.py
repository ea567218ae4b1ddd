"""Measures how good reconstructions and samples are. Knows pictures and features, never a tokenizer or a generator.

features: the feature network. reference: features of a set of pictures, and their cache. frechet, reconstruction,
classifier, neighbours: the measurements. generation: all of them for a set of samples. metrics_json, report:
what a run leaves behind.
"""
