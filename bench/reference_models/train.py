"""Train a reference model and write its FP16 file: `nox -s bench -- reference_models/train.py flux`.

If stopped, it resumes when started again. On a GPU, train longer and on larger pictures:
--device cuda --steps 40000 --batch 128 --latent-size 32.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # this package's parent, not the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rig.inprocess import load_comfy
from rig.tree import cache_folder
from safetensors.torch import save_file
from tqdm import tqdm

from reference_models.architectures import REFERENCES
from reference_models.training import Settings, Trainer


def main() -> None:
    """Train or resume, then write the file."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(REFERENCES))
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--batch", type=int, default=defaults.batch)
    parser.add_argument("--latent-size", type=int, default=defaults.latent_size, help="half the picture's side")
    parser.add_argument("--rate", type=float, default=defaults.rate)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--save-every", type=int, default=250, help="steps between saved states")
    parser.add_argument("--output", type=Path, help="default: tests/data/reference_models/<model>.safetensors")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load_comfy(cpu=options.device == "cpu")
    reference = REFERENCES[options.model]
    settings = Settings(options.steps, options.batch, options.latent_size, options.rate, seed=options.seed)
    trainer = Trainer(reference, settings, torch.device(options.device))
    state = cache_folder() / "reference_models" / f"{reference.name}.pt"
    if state.exists():
        trainer.resume(state)
    train(trainer, state, options.save_every)
    write(trainer, options.output or reference.file)


def train(trainer: Trainer, state: Path, every: int) -> None:
    """Run to the end with a progress bar, saving the state along the way."""
    state.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        temporary = state.with_suffix(".tmp")
        torch.save(trainer.state(), temporary)
        temporary.replace(state)

    with tqdm(total=trainer.settings.steps, initial=trainer.step, mininterval=10) as bar:

        def told(step: int, loss: float) -> None:
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update(step - bar.n)

        trainer.run(told, save, every)


def write(trainer: Trainer, path: Path) -> None:
    """Write the averaged weights to a file, with the training settings in its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    last = trainer.losses[-200:]
    header = {key: str(value) for key, value in trainer.state()["settings"].items()}
    header |= {"loss": f"{sum(last) / len(last):.4f}", "seconds": f"{trainer.seconds:.0f}"}
    save_file(trainer.trained(), path, metadata={"format": "pt", **header})
    print(f"{path}: {path.stat().st_size:,} bytes, loss {header['loss']}, {trainer.seconds / 60:.0f} min")


if __name__ == "__main__":
    main()
