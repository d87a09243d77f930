"""Parallel blockwise distillation (Blakeney, Li, Yan, Zong: IEEE TPDS 2021, arXiv 2012.03096).

Every 3x3 convolution of a trained teacher's backbone is replaced by two depthwise-separable ones, each learnt alone:
inputs are the frozen teacher's activations before the convolution, target what the teacher makes of them. The tasks
exchange nothing, so as many run at once as there are workers; then they are put together and fine-tuned as one network.

`replaceable` finds the convolutions, `activations` keeps what enters them, `task` learns one block, `schedule` says in
which order and where, `engine` runs the tasks, `assembly` puts the network together, `stage` does all this in a folder.
"""
