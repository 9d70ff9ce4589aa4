"""What the lessons add: checks, the explorer, broken models, a file server, the lab family."""

__all__: list[str] = []
