"""Exports: python launch/export.py TEST.WEIGHT FILE [--to onnx,torch,safetensors] [--output FOLDER] [KEY VALUE ...]."""

import sys

from reid.launcher import main

if __name__ == "__main__":
    sys.exit(main("export", "Write a trained model for other programs, checked against the model itself."))
