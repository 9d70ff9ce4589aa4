"""Downloads: every file of a model comes to its place with the right bytes, or not at all."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, None, {"transfer": ["download"]})
