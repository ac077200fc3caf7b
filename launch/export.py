"""Export: python launch/export.py TEST.WEIGHT FILE [--to onnx,torch,safetensors] [--output FOLDER] [KEY VALUE ...]."""

from reid.commands.main import exit_process, main

if __name__ == "__main__":
    exit_process(main("export"))
