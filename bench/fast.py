"""How much of a model can multiply in 8 bits, and how much its calls lose.

    nox -s bench -- fast.py --models flux

What the Converter's report says with format comfy at +3 % for several values of `fast_matmul`. `nox -s quality` shows
what the pictures lose.
"""

from __future__ import annotations

from judge.options import begun, parser
from judge.subject import Subject
from reference_models.architectures import REFERENCES

EXTRA, PICTURES = 3.0, 32
LOSSES = (3.0, 6.0, 100.0)


def main() -> None:
    """Print a line for each model and loss."""
    for name in begun(parser(__doc__)).models:
        subject = Subject(REFERENCES[name], PICTURES)
        for loss in LOSSES:
            outcome = subject.solved("comfy", EXTRA, fast_matmul=loss)[2]
            print(f"{REFERENCES[name].layout}, {loss:g} dB: {outcome.fast}", flush=True)


if __name__ == "__main__":
    main()
