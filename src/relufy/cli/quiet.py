"""Keeps other libraries' progress bars and advice off the terminal: a command shows its own."""


def quiet_libraries() -> None:
    """Turn off what transformers and datasets print of their own accord; errors still show."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
