"""Evaluation: embeddings of all ranks, their scores, rows for every query, and pictures of ranked galleries.

It may import runs, data and every package below them.
"""
