"""`python -m moa_train.export` is `moa-export`."""

from moa_train.cli.export import main

if __name__ == "__main__":
    main()
