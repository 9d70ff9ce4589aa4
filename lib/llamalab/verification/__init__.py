"""Verification: is a directory, file by file, what was published, recorded or given?"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, None, {"verification": ["verify"]})
