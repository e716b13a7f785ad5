"""The legacy training scripts' command lines, for :mod:`moe_core.commands`: their flags, and how a line is cut.

The legacy training scripts are the three whose command lines, console output and logs the workbench understands:
``train_experimental.py`` (a top-1 MoE), ``train_dense_gpu.py`` (several optimizers on a dense model) and
``launch_training.py`` (a top-2 MoE). None of them is part of this project.
"""
