"""Evaluation: what a checkpoint knows in text and by ear, each number with its interval.

One JSON per (checkpoint, task) holds the `scores.Score` rows of that cell and its items;
stages/report.py reads them.
"""
