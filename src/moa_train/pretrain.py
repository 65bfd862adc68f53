"""`python -m moa_train.pretrain` is `moa-pretrain`."""

from moa_train.cli.pretrain import main

if __name__ == "__main__":
    main()
