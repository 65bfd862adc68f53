"""`python -m moa_train.controlnet` is `moa-controlnet`."""

from moa_train.cli.controlnet import main

if __name__ == "__main__":
    main()
