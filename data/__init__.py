"""Pictures in, batches out.

decode.py      the bytes of one picture to RGB
base.py        what sources share, listed and streamed ones
checks.py      what is asked of a source before it is used, and what a run tells about it
sources.py     open_source(url): folder://, list://, wds://, datasets://, embedded://, synthetic://, tokens://
shards.py      tar shards: on a disk with random access, on a web server or the hub as a stream
hf.py          Hugging Face datasets
transforms.py  crops as pure functions, and the Transform a config describes
loader.py      training batches in an order that depends on (seed, position) alone; ordered passes
cache.py       tensors computed once from every view of every picture, memory-mapped
tokens.py      caches of what a tokenizer makes, to train from without pictures
token_files.py files of other code bases: tokens, in and out; moments of RecTok's latents
pairing.py     which line of such a file belongs to which picture
"""

from data.cache import FeatureCache, build
from data.decode import UnreadablePicture
from data.loader import Loader, listed_batches, ordered_batches, part, split
from data.sources import open_source
from data.transforms import Transform

__all__ = [
    "FeatureCache",
    "Loader",
    "Transform",
    "UnreadablePicture",
    "build",
    "listed_batches",
    "open_source",
    "ordered_batches",
    "part",
    "split",
]
