"""Export a tuned model as a Hugging Face folder: `tunesmith convert`, looking for runs in `$HOME`."""

import sys

from tunesmith.chart.scripts import run_convert

if __name__ == "__main__":
    sys.exit(run_convert())
