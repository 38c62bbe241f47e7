"""Runs under one transformers release: the defaults of the configuration classes that are named.

    PYTHONPATH=RELEASE python config_defaults_script.py CLASS [CLASS ...]

Prints them as JSON by class. Not a test module; tests/test_meanings.py starts it.
"""

import json
import sys
import warnings


def main(names: list[str]) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    print(json.dumps({name: getattr(transformers, name)().to_dict() for name in names}))


main(sys.argv[1:])
