"""Programs put together: what sees all other packages. scripts/ parses the arguments.

run.load_tokenizer(reference), run.load_generator(reference)      finished models for Python, run/models.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from run.models import GeneratorModel as GeneratorModel
    from run.models import TokenizerModel as TokenizerModel
    from run.models import load_generator as load_generator
    from run.models import load_tokenizer as load_tokenizer

_OF_MODELS = ("load_tokenizer", "load_generator", "TokenizerModel", "GeneratorModel")


def __getattr__(name: str) -> Any:
    """Heavy imports wait until someone asks: the programs' --help does without torch."""
    if name not in _OF_MODELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from run import models

    return getattr(models, name)
