"""What ends a session with a sentence instead of a traceback."""

EXIT_LOST = 69  # sysexits.h: unavailable. A process ended because another one of its session had


class CannotRun(Exception):
    """Data, options, devices or a checkpoint can't be used, or training diverged; the message is for the user."""
