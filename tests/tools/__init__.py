"""Programs for developers that are no part of the product: python -m tests.tools.NAME."""
