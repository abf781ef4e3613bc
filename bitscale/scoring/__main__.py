"""lm-eval's own command line, with bitscale's models and tasks:

python -m bitscale.scoring --model bitscale --model_args path=runs/a --tasks bitscale_olmo11

lm-eval 0.4.13 finds model classes of other packages only if they are imported before it starts.
"""

import sys
from pathlib import Path


def main() -> None:
    try:
        from lm_eval.__main__ import cli_evaluate

        import bitscale.scoring.lm_eval_model  # noqa: F401  (registers the model class)
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error.name} is not installed; pip install 'bitscale[eval]'")
    if "--include_path" not in sys.argv:
        sys.argv += ["--include_path", str(Path(__file__).parent)]
    cli_evaluate()


if __name__ == "__main__":
    main()
