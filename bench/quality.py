"""How good are the pictures? Every method on the trained reference models, compared with FP16.

    nox -s quality                                       # all models, all methods
    nox -s quality -- --models flux --prompts 8 --quick

Each method writes a file through the pack's own code path (calibration wrapper, planner, writer, check), the loader
that people would use opens it, and ComfyUI samples prompts and seeds that calibration never saw.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from judge import report
from judge.ablation import ABLATION
from judge.methods import METHODS
from judge.options import begun, parser
from judge.scores import Truth, judge
from judge.sheet import contact_sheet
from judge.subject import Subject
from reference_models.architectures import REFERENCES
from rig import pack
from tqdm import tqdm


def main() -> None:
    """Judge, print the tables, write JSON, plot and contact sheets."""
    asked = parser(__doc__)
    asked.add_argument("--prompts", type=int, default=48, help="pictures to judge by")
    asked.add_argument("--calibrate", type=int, default=32, help="pictures to calibrate with")
    asked.add_argument("--calibration", type=int, default=0, help="which independent set of calibration prompts")
    asked.add_argument("--states", type=int, help="model calls to keep; default: the node's")
    asked.add_argument("--methods", nargs="*", help="rows to judge, by name; default: all")
    asked.add_argument("--ablation", action="store_true", help="the parts of model_aware instead")
    asked.add_argument("--quick", action="store_true", help="without the methods that take minutes")
    asked.add_argument("--output", type=Path, default=pack.ROOT / "quality_output", help="folder for the results")
    asked.add_argument("--add", type=Path, nargs="+", default=[], help="results.json of other models, to show beside")
    asked.add_argument("--against", type=Path, help="results.json of another run: exit 1 if they disagree")
    options = begun(asked)
    options.output.mkdir(parents=True, exist_ok=True)
    results = {}
    for other in options.add:
        results |= report.from_json(other.read_text(encoding="utf-8"))
    results |= {name: judged(name, options) for name in options.models}
    settings = {key: getattr(options, key) for key in ("prompts", "calibrate", "calibration", "states", "threads")}
    (options.output / "results.json").write_text(report.to_json(results, settings), encoding="utf-8")
    titles = {name: REFERENCES[name].layout for name in results}
    report.plot(results, titles, options.output / "quality.png")
    for name, scores in results.items():
        print(f"\n{titles[name]}\n\n{report.table(scores)}")
    print(f"\n{report.summary(results, titles)}")
    if options.against:
        agree(results, options.against)


def judged(name: str, options: argparse.Namespace) -> list[report.Score]:
    """All methods on one model."""
    rows = ABLATION if options.ablation else METHODS
    wanted = options.methods or [method.name for method in rows]
    methods = [method for method in rows if method.name in wanted and not (method.slow and options.quick)]
    with tqdm(total=len(methods) + 2, bar_format="{n_fmt}/{total_fmt} {desc}", dynamic_ncols=True) as bar:
        bar.set_description_str(f"{name}: drawing FP16")
        truth = Truth.of(REFERENCES[name], options.prompts)
        bar.update()
        bar.set_description_str(f"{name}: calibrating")
        subject = Subject(REFERENCES[name], options.calibrate, options.calibration, options.states)
        bar.update()
        drawn = []
        for method in methods:
            bar.set_description_str(f"{name}: {method.label}")
            drawn.append(judge(method, subject, truth))
            bar.update()
    # The formats of a method look alike: show its v2 file, or its only one.
    shown = [row for row in drawn if not row[0].method.endswith((" v1", " comfy"))]
    contact_sheet(truth, shown, options.output / f"{name}.png")
    return [score for score, _ in drawn]


def agree(results: report.Results, other: Path) -> None:
    """Compare with an earlier run."""
    found = report.disagreements(results, report.from_json(other.read_text(encoding="utf-8")))
    if found:
        raise SystemExit(f"Differs from {other} by more than {report.AGREES_DB} dB:\n" + "\n".join(found))
    print(f"\nAgrees with {other} to {report.AGREES_DB} dB.")


if __name__ == "__main__":
    main()
