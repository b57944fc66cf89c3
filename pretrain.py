"""Pretrain Linear-Llama3 with its sequences shared among ranks: ``torchrun --nproc-per-node 4 pretrain.py --sp lasp2``.

``python pretrain.py --help`` explains every option; without torchrun it trains on one device.
"""

from lasp.pretrain import main

if __name__ == "__main__":
    main()
