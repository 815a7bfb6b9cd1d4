"""What is raised when ranks cannot talk. Imports no torch, so that commands that need none can name it."""


class CollectiveError(RuntimeError):
    """A collective failed: a peer is gone, a timeout passed, or ranks disagree. The communicator is of no more use."""
