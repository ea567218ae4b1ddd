"""Pictures in, batches out.

    base.py        decode anything to RGB; what listed sources share
    sources.py     open_source("folder://...", "list://", "wds://", "embedded://", "synthetic://")
    wds.py         tar shards with random access
    transforms.py  crops as pure functions, and the Transform a config describes
    loader.py      training batches in an order that depends on (seed, position) alone; ordered passes
    cache.py       teacher features and latents computed once
"""

from data.base import UnreadablePicture
from data.cache import FeatureCache, build
from data.loader import Loader, ordered_batches, part, split
from data.sources import open_source
from data.transforms import Transform

__all__ = ["FeatureCache", "Loader", "Transform", "UnreadablePicture", "build", "open_source", "ordered_batches",
           "part", "split"]
