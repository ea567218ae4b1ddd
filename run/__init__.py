"""Programs put together: what sees all other packages. scripts/ parses the arguments.

run.load_tokenizer(reference), run.load_generator(reference)      finished models for Python, run/models.py
"""

from __future__ import annotations

import sys
from pathlib import Path
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
    try:
        from run import models
    except ImportError as error:
        if found := namesake():
            raise ImportError(found) from error
        raise

    return getattr(models, name)


def namesake() -> str:
    """A sentence about a package of another project that has the name of one of ours and was imported before it; or ""."""
    root = Path(__file__).resolve().parent.parent
    for name in ("core", "data", "evaluation", "generator", "run", "tokenizer"):
        theirs = getattr(sys.modules.get(name), "__path__", None) or [getattr(sys.modules.get(name), "__file__", None)]
        places = [Path(place).resolve() for place in theirs if place]
        if places and not any(place.is_relative_to(root) for place in places):
            return (
                f"this process has imported another `{name}` ({places[0]}), the name of a package of Tessera in {root}: rename "
                "it, or use Tessera in a process of its own."
            )
    return ""
