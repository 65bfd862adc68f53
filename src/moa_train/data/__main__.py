"""`python -m moa_train.data` is `moa-data`."""

from moa_train.cli.data import main

if __name__ == "__main__":
    main()
