"""A generated benchmark of people in the Market-1501 layout: `generate` writes it, `people` and `cameras` draw it."""
