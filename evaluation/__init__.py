"""Measures how good reconstructions and samples are. Knows pictures and features, never a tokenizer or a generator.

Start with protocols (what is measured, by name) and measure (pictures -> features -> scores).
work: chunks that ranks share and a restart continues. pictures, references: what is read and written.
networks: where features come from. distances, images, intervals: the measurements; scores puts those of a protocol
together. report: what a run leaves behind. toy: the quickstart's own numbers. probe: linear probing.
"""
