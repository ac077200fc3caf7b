"""Retrieval: distances, CMC, mAP and mINP, TPR at FPR, exact neighbors, k-reciprocal re-ranking.

Pure functions on tensors: no rank, setting, logger or file.
"""
