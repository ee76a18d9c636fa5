"""The demo: a model becomes a faster model, end to end, with the numbers to show for it."""
