"""The parts of the automatic search (methods/auto.py): texts, costs, scores, allocation, frontier."""
