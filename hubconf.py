"""Entry points of torch.hub: torch.hub.load("path/to/this/folder", "tokenizer", REFERENCE, source="local").

REFERENCE is a run folder, a file of weights, the name of a released one, or hf://owner/repository/file; what comes back is
a run.models.TokenizerModel or GeneratorModel.
"""

from run import load_generator as generator
from run import load_tokenizer as tokenizer

dependencies = ["torch", "safetensors", "omegaconf", "timm", "huggingface_hub"]
__all__ = ["generator", "tokenizer"]
