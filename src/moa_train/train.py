"""`python -m moa_train.train` is `moa-train`."""

from moa_train.cli.train import main

if __name__ == "__main__":
    main()
