"""Run a command: python -m reid COMMAND ..., or torchrun --nproc_per_node=N -m reid COMMAND ...."""

from reid.commands.main import console

if __name__ == "__main__":
    console()
