"""How much of a model may multiply in 8 bits, and what its calls lose by it.

    nox -s bench -- fast.py --models flux

What the Converter's report says with format comfy at +3 % for several values of `fast_matmul`; what the pictures lose:
`nox -s quality`.
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
