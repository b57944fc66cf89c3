"""Pretrain Linear-Llama3 with its sequences shared among ranks: ``torchrun --nproc-per-node 4 pretrain.py --sp lasp2``.

``python pretrain.py --help`` explains every option; without torchrun it trains on one device.
"""

from __future__ import annotations

from lasp.parallel.mesh import build_mesh, launched_ranks, processes
from lasp.training import Trainer, errors_in_one_line, read_options


def main() -> None:
    """Options, ranks, model and data; then train."""
    with errors_in_one_line("pretrain.py"):
        options = read_options()
    with processes(options.device_type()), errors_in_one_line("pretrain.py"):
        mesh = build_mesh(options.device_type(), options.ranks_of_a_sequence(launched_ranks()))
        closing = Trainer(options, mesh).train()
    if closing:
        print(closing)


if __name__ == "__main__":
    main()
