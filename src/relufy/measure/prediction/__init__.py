"""Predicting which neurons are active: scores of low rank, their thresholds, and how well they do."""
