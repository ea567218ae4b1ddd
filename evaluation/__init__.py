"""Measures how good reconstructions and samples are. Knows pictures and features, never a tokenizer or a generator.

Start with protocols (what is measured, by name) and runner (pictures -> features -> scores).
work: chunks that ranks share and a restart continues. pictures, writers, statistics, labels: what is read and written.
features, inception: the networks. metric: what a metric is. moments, frechet, inception_score, kid, manifold,
image_metrics, codebook, intervals, naming: the measurements; scores puts those of a protocol together.
record, metrics_json, report: what a run leaves behind.
generation, reference, classifier, neighbours: the quickstart's page. probe: linear probing.
"""
