"""Evaluate a tuned model beside its base model: `tunesmith evaluate`, looking for runs in `$HOME`."""

import sys

from tunesmith.chart.scripts import run_evaluate

if __name__ == "__main__":
    sys.exit(run_evaluate())
