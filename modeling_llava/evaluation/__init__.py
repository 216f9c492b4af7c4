"""Benchmarks: answers, scores, tables and plots, with results that say what they were made of."""
