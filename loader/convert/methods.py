"""Methods for converting a connected MODEL: model_aware, which runs it, and those of the core's table."""

from __future__ import annotations

from ...hswq_core.methods.method import MODEL, SESSION, STATES, Method, Planned
from ...hswq_core.methods.table import METHODS as CORE_METHODS
from ...hswq_core.plan.budget import Budget
from ...hswq_core.progress import Step
from ..devices import runs_on_cpu
from ..model_aware.plan import ModelTask, plan_model_aware
from .advice import ON_CPU, prompts_notes


def _model_aware(task: ModelTask, budget: Budget) -> Planned:
    if runs_on_cpu():
        task.progress(Step(ON_CPU), 0, 1)
    outcome = plan_model_aware(task, budget)
    return Planned(outcome.plan, outcome.solutions, (*outcome.notes(), *prompts_notes(task.states)))


MODEL_AWARE: Method[ModelTask] = Method(
    "model_aware",
    _model_aware,
    needs=frozenset({SESSION, STATES, MODEL}),
    settings=Budget,
    own_codes=True,
    options=True,
)
# A MODEL comes with a session; what needs none converts files as well without loading them.
_ROWS: tuple[Method[ModelTask], ...] = (MODEL_AWARE, *CORE_METHODS.values())
METHODS = {row.name: row for row in _ROWS if SESSION in row.needs}
