"""Parallel blockwise distillation (Blakeney, Li, Yan, Zong: IEEE TPDS 2021, arXiv 2012.03096).

Every 3x3 convolution of a trained teacher's backbone is replaced by a depthwise-separable block b. Each block is
trained separately. It minimizes the mean of (b(x) - y)^2, where x is the input of the convolution in the frozen teacher
and y the teacher's output behind the following normalization. The blocks are independent, so several workers train them
in parallel. Afterwards all blocks are assembled and fine-tuned as one network.

Modules: `blocks` finds the convolutions, records their inputs and assembles the network, `worker` holds the settings
and trains one block, `executor` schedules and runs the tasks, `stage` trains all blocks, `method` runs the whole method
and writes the report.
"""
