"""Runs under one transformers release: the defaults of the configuration classes that are named.

    PYTHONPATH=RELEASE python config_defaults_script.py CLASS [CLASS ...]

Prints them as JSON by class, null for one that the release has not. Not a test module; tests/test_meanings.py
starts it.
"""

import json
import sys
import warnings


def main(names: list[str]) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    classes = {name: getattr(transformers, name, None) for name in names}
    print(json.dumps({name: c().to_dict() if c else None for name, c in classes.items()}))


main(sys.argv[1:])
