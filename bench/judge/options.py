"""Command-line options shared by all benches of the reference models."""

from __future__ import annotations

import argparse
import logging

import torch
from reference_models.architectures import REFERENCES

from judge.subject import prepare


def parser(description: str) -> argparse.ArgumentParser:
    """--models and --threads; the bench adds its own."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", nargs="*", choices=sorted(REFERENCES), default=sorted(REFERENCES))
    made.add_argument("--threads", type=int, default=2, help="of torch")
    return made


def begun(asked: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, with ComfyUI ready in this process."""
    options = asked.parse_args()
    torch.set_num_threads(options.threads)
    prepare()
    logging.disable(logging.INFO)  # ComfyUI logs every file it loads
    return options
