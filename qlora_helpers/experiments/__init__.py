"""Many runs: those of a comparison or a batch, and the notebook series."""

from qlora_helpers._lazy import lazy

MODULES = {
    "plan_runs": "matrix",  # the runs that a comparison needs
    "run_batch": "series",  # one run for each sample count, setting and seed
    "run_series": "series",  # notebooks 01-07, headless
    "train_missing": "matrix",  # train the planned runs that are not finished
}
__all__ = list(MODULES)
__getattr__ = lazy(__name__, MODULES)
