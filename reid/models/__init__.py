"""Models: backbones by name (torchvision-style, IBN, SE, OSNet, timm) and the re-identification model around them.

It may import retrieval, losses, config and every package below them.
"""
