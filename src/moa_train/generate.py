"""`python -m moa_train.generate` is `moa-generate`."""

from moa_train.cli.generate import main

if __name__ == "__main__":
    main()
