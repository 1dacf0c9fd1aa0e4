"""What a walk wants besides models and texts."""


class Silence:
    """A Step that shows nothing."""

    def begin(self, stage: str, block: int | None = None) -> None: ...

    def advance(self, tokens: int) -> None: ...
