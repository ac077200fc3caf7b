"""Embeds: torchrun --nproc_per_node=N launch/embed.py FOLDER [--output OUT] TEST.WEIGHT FILE [KEY VALUE ...]."""

from reid.commands.main import leave, main

if __name__ == "__main__":
    leave(main("embed", "Write the embeddings of all images in a folder, as a gallery to search in."))
