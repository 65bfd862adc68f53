"""`python -m moa_train.eval` is `moa-eval`."""

from moa_train.cli.evaluate import main

if __name__ == "__main__":
    main()
